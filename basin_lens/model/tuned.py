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

from basin_lens.errors import ModelError, StoreError
from basin_lens.model.checkpoint import Found, note_unused, some, unused_weights
from basin_lens.model.identity import check_model, fingerprint, full_name, kind_of, parameters_of, remember_name, source_of

_FORMAT = "basin_lens tuned model 1"
_WEIGHTS, _FACTS = "weights.safetensors", "tuned.json"


def copy_of(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of the model, in another number format if one is given; the model stays as it is. Twice the memory.

    Raises:
        ModelError: a model that cannot be copied.
    """
    check_model(model)
    try:
        # TransformerLens prints that it changes the format.
        with torch.inference_mode(False), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            made = copy.deepcopy(model)
            made = made if dtype is None else made.to(dtype)
            _own_hooks(made)
    except Exception as error:  # deepcopy of a user's model runs any code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"expected a model that can be copied, got {full_name(model)}: {reason} Load it a second time.") from error
    remember_name(made, full_name(model), source_of(model))
    note_unused(made, unused_weights(model))
    return made


def _own_hooks(bridge: Any) -> None:
    """Let the blocks of a copied bridge set their hooks anew: TransformerLens's hold on to the modules of the original.

    A pass through the copy would leave states, with their graph, in the original.
    """
    for block in bridge.blocks:
        if getattr(block, "_capture_hooks_wired", False):
            block._teardown_capture_hooks()
            block._maybe_wire_capture_hooks()


def is_tuned_folder(path: Path) -> bool:
    """Whether `save_tuned` wrote this folder."""
    return (path / _FACTS).is_file()


def save_tuned(model: Any, folder: str | os.PathLike[str], base: Any, facts: Mapping[str, Any]) -> Path:
    """Keep the model's weights as safetensors, with what they were made from, so that `load_model(folder)` finds them.

    Args:
        model: the tuned model.
        folder: made if it is not there; an earlier tuned model in it is replaced.
        base: the model that it was a copy of.
        facts: plain JSON: how it was tuned.

    Raises:
        StoreError: the folder cannot be written.
    """
    target = Path(folder)
    record = {
        "format": _FORMAT, "name": full_name(model), "fingerprint": fingerprint(model), "kind": kind_of(model),
        "dtype": str(next(iter(parameters_of(model).values())).dtype).removeprefix("torch."),
        "base": {"name": full_name(base), "fingerprint": fingerprint(base), "source": source_of(base)}, "facts": dict(facts),
    }  # fmt: skip
    weights = {name: value.detach().cpu().contiguous() for name, value in parameters_of(model).items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        # The record is written last: without it, the folder is no model.
        for name, write in (
            (_WEIGHTS, lambda path: save_file(weights, path)),
            (_FACTS, lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8")),
        ):
            write(target / f".{name}")
            os.replace(target / f".{name}", target / name)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"expected a folder that can be written, got {str(target)!r}: {error}. Choose another.") from error
    return target


def tuned_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a tuned model: `name`, `fingerprint`, `kind`, `dtype`, `base`, `facts`.

    Raises:
        ModelError: no such record, another format, or one that was changed.
    """
    path = Path(folder) / _FACTS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"expected a tuned model's folder with {_FACTS}, got {str(folder)!r}: {error}. Check the path, or tune the model again."
        ) from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ModelError(f"expected {_FORMAT!r} in {str(path)!r}, got {str(record)[:60]!r}. Was it written by another version?")
    if wrong := _wrong_in(record):
        raise ModelError(
            f"expected a whole record in {str(path)!r}, got one with another {wrong}: it was changed. Tune the model again."
        )
    return record


def _wrong_in(record: Mapping[str, Any]) -> str | None:
    """The first field of a record that is not what `save_tuned` writes."""
    base = record.get("base")
    source = base.get("source", "none") if isinstance(base, dict) else "none"
    known = {
        "name": isinstance(record.get("name"), str),
        "fingerprint": isinstance(record.get("fingerprint"), str),
        "kind": record.get("kind") in ("bridge", "hooked"),
        "dtype": isinstance(found := record.get("dtype"), str) and isinstance(getattr(torch, found, None), torch.dtype),
        "facts": isinstance(record.get("facts"), dict),
        "base": isinstance(base, dict) and isinstance(base.get("name"), str) and isinstance(base.get("fingerprint"), str),
        "source of the base": source is None or (isinstance(source, dict) and isinstance(source.get("name_or_path"), str)),
    }
    return next((name for name, right in known.items() if not right), None)


def check_chain(folder: Path) -> None:
    """Refuse a tuned model that is, over its bases, made from itself.

    Raises:
        ModelError: it is, or one of the records was changed.
    """
    seen: list[Path] = []
    while is_tuned_folder(folder):
        if folder.resolve() in seen:
            raise ModelError(
                f"expected a tuned model that goes back to a model of another kind, got {str(folder)!r}, which is its own base. Tune the "
                "model again into a folder of its own."
            )
        seen.append(folder.resolve())
        source = tuned_facts(folder)["base"]["source"]
        if source is None:
            return
        folder = Path(source["name_or_path"])


def put_tuned(base: Any, folder: str | os.PathLike[str]) -> Any:
    """A copy of `base` with the weights of a tuned model's folder.

    Raises:
        ModelError: weights of another model, or a function other than the one that was saved.
    """
    record = tuned_facts(folder)
    try:
        weights = load_file(Path(folder) / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"expected {_WEIGHTS} in {str(folder)!r}, got: {error}. Tune the model again.") from error
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
