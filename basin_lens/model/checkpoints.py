"""Models with changed weights: a copy to train, and the folder in which trained weights are kept."""

import contextlib
import copy
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from basin_lens import records
from basin_lens.errors import ModelError, StoreError
from basin_lens.files import lock_folder, write_file
from basin_lens.model.identity import check_model, fingerprint, full_name, kind_of, parameters_of, remember_name, source_of
from basin_lens.model.protocol import HookedModel
from basin_lens.model.state_dicts import Found, note_unused, some, unused_weights
from basin_lens.values import Facts

_KIND = records.Kind("a tuned model", "basin_lens tuned model 2", "Tune the model again.", ModelError)
_FIELDS = {"name": str, "fingerprint": str, "kind": str, "dtype": str, "base": dict, "facts": dict}
_BASE: dict[str, records.Expected] = {"name": str, "fingerprint": str, "source": (dict, None)}
_WEIGHTS, _FACTS = "weights.safetensors", "tuned.json"
_OTHER = "weights-2.safetensors"  # beside an earlier model's, until the record names it


def copy_of(model: HookedModel, dtype: torch.dtype | None = None, device: str | None = None) -> HookedModel:
    """A copy of the model, in another number format or on another device if one is given; the model stays as it is. Twice the
    memory; of another device, only there.

    Raises:
        ModelError: a model that cannot be copied.
    """
    check_model(model)
    try:
        # TransformerLens prints that it changes the format.
        with torch.inference_mode(False), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            made = copy.deepcopy(model, {} if device is None else _moved(model, device))
            made = made if device is None else made.to(device)  # which tells its configuration, too
            made = made if dtype is None else made.to(dtype)
            _own_hooks(made)
    except Exception as error:  # deepcopy of a user's model runs any code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"expected a model that can be copied, got {full_name(model)}: {reason} Load it a second time.") from error
    remember_name(made, full_name(model), source_of(model))
    note_unused(made, unused_weights(model))
    return made


def _moved(model: HookedModel, device: str) -> dict[int, object]:
    """A model's tensors on another device, by the identity of what they are copies of, as `deepcopy` takes them."""
    module: Any = model  # buffers are torch's own
    parameters = {id(one): torch.nn.Parameter(one.detach().to(device), one.requires_grad) for one in model.parameters()}
    return {**{id(one): one.detach().to(device) for one in module.buffers()}, **parameters}


def _own_hooks(bridge: HookedModel) -> None:
    """Let the blocks of a copied bridge set their hooks anew: TransformerLens's hold on to the modules of the original.

    A pass through the copy would leave states, with their graph, in the original.
    """
    block: Any  # these methods are TransformerLens's own
    for block in bridge.blocks:
        if getattr(block, "_capture_hooks_wired", False):
            block._teardown_capture_hooks()
            block._maybe_wire_capture_hooks()


def is_tuned_folder(path: Path) -> bool:
    """Whether `save_tuned` wrote this folder."""
    return (path / _FACTS).is_file()


def save_tuned(model: HookedModel, folder: str | os.PathLike[str], base: HookedModel, facts: Mapping[str, object]) -> Path:
    """Keep the model's weights as safetensors, with what they were made from, so that `load_model(folder)` finds them.

    Args:
        model: the tuned model.
        folder: made if it is not there; an earlier tuned model in it stays whole until the new one is.
        base: the model that it was a copy of.
        facts: plain JSON: how it was tuned.

    Raises:
        StoreError: the folder cannot be written, or is that of the base, without which the model could not be loaded.
    """
    target = Path(folder)
    _refuse_base(target, base)
    record = {
        "name": full_name(model),
        "fingerprint": fingerprint(model),
        "kind": kind_of(model),
        "dtype": str(next(iter(parameters_of(model).values())).dtype).removeprefix("torch."),
        "base": {"name": full_name(base), "fingerprint": fingerprint(base), "source": source_of(base)},
        "facts": dict(facts),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in parameters_of(model).items()}
    try:
        with lock_folder(target):
            chosen = _OTHER if _listed(target) == _WEIGHTS else _WEIGHTS
            # The record is written last: without it, the folder is no model, and until then it is the earlier one.
            write_file(target / chosen, lambda path: save_file(weights, path))
            write_file(target / _FACTS, _KIND.record(record, {chosen: records.digest(target / chosen)}, indent=1))
            for name in {_WEIGHTS, _OTHER} - {chosen}:
                (target / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"expected a folder that can be written, got {str(target)!r}: {error}. Choose another.") from error
    return target


def _refuse_base(target: Path, base: HookedModel) -> None:
    """A model is kept as its difference from its base, which must stay where it is."""
    seen: set[Path] = set()
    source = source_of(base)
    while source is not None and is_tuned_folder(found := Path(source["name_or_path"]).resolve()) and found not in seen:
        if found == target.resolve():
            raise StoreError(
                f"expected a folder other than that of the model which was tuned further, got {str(target)!r}: it is needed to "
                "load the new one. Choose another."
            )
        seen.add(found)
        try:
            source = json.loads((found / _FACTS).read_text(encoding="utf-8"))["base"]["source"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: nothing to keep
            return


def _listed(folder: Path) -> str | None:
    """The file of weights that a folder's record lists; None without a record, or with a damaged one: nothing to keep."""
    try:
        (name,) = json.loads((folder / _FACTS).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def tuned_facts(folder: str | os.PathLike[str]) -> Facts:
    """The record of a tuned model, its weights proven to be its own.

    Returns:
        `name`, `fingerprint`, `kind`, `dtype`, `base`, `facts`, `files`.

    Raises:
        ModelError: no such record, another version's, or a folder that is not as it was saved.
    """
    path = Path(folder)
    record = _KIND.read(path / _FACTS, _FIELDS)
    with _KIND.reading(path):
        records.fields(record["base"], _BASE)
        if record["base"]["source"] is not None:
            records.fields(record["base"]["source"], {"name_or_path": str, "kind": str})
        if record["kind"] not in ("bridge", "hooked") or not isinstance(getattr(torch, record["dtype"], None), torch.dtype):
            raise ValueError(f"the kind {record['kind']!r} or number format {record['dtype']!r}")
        _weights_in(path, record)
    return record


def _weights_in(folder: Path, record: Facts) -> Path:
    """The one file that the record lists, proven.

    Raises:
        ModelError, ValueError: it is not as it was saved, or not one.
    """
    ((name, facts),) = record["files"].items()
    return _KIND.check(folder, name, facts)


def check_chain(folder: Path) -> None:
    """Refuse a tuned model that is, over its bases, made from itself.

    Raises:
        ModelError: it is, or one of the records was changed.
    """
    seen: list[Path] = []
    while is_tuned_folder(folder):
        if folder.resolve() in seen:
            raise ModelError(
                f"expected a tuned model that goes back to a model of another kind, got {str(folder)!r}, which is its own base. "
                "Tune the model again into a folder of its own."
            )
        seen.append(folder.resolve())
        source = tuned_facts(folder)["base"]["source"]
        if source is None:
            return
        folder = Path(source["name_or_path"])


def put_tuned(base: HookedModel, folder: str | os.PathLike[str]) -> HookedModel:
    """A copy of `base` with the weights of a tuned model's folder.

    Raises:
        ModelError: weights of another model, a function other than the one that was saved, or a folder that is not as it was saved.
    """
    record = tuned_facts(folder)
    with _KIND.reading(folder):
        weights = load_file(_weights_in(Path(folder), record))
    found = Found.compared(*({name: tuple(value.shape) for name, value in held.items()} for held in (weights, parameters_of(base))))
    if wrong := found.misfit() or (f"one with others: {some(found.unexpected)}." if found.unexpected else ""):
        raise ModelError(
            f"expected weights for {full_name(base)}, got those of {record['name']}, which has other parameters: "
            f"{wrong} Load its base model, {record['base']['name']}."
        )
    model = copy_of(base)
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(weights[name])
    remember_name(model, record["name"])
    if fingerprint(model) != record["fingerprint"]:
        raise ModelError(
            f"expected the model that was saved in {str(folder)!r}, got one that computes something else: other settings, weight "
            "processing, or versions of the libraries. Use the base model and versions that its tuned.json names."
        )
    return model.eval()
