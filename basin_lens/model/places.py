"""What `load_model` is asked for: a device, a number format, and where the weights are; refused before anything is read."""

import json
import operator
import os
from pathlib import Path
from typing import SupportsIndex, cast

import torch

from basin_lens.errors import ModelError
from basin_lens.values import Facts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = 'Give "cpu", "cuda", "cuda:1" or "mps", or leave it out: CUDA if there is one, else the CPU.'
_GGUF = b"GGUF"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# One of these is in every folder with a tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "merges.txt", "*.tiktoken", "tekken.json", "*.spm", "*.bpe")


def chosen_device(device: object) -> torch.device:
    """The device, if this machine has it and it holds numbers; None: CUDA if there is one, else the CPU.

    Raises:
        ModelError: no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(device, bool):
            raise TypeError
        named = device if isinstance(device, str | torch.device) else f"cuda:{operator.index(cast('SupportsIndex', device))}"
        chosen = torch.device(named)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"expected the name of a device, got {device!r}. {_DEVICES}") from error
    if chosen.type == "meta":
        raise ModelError(f'expected a device that holds numbers, got "meta", which knows shapes only. {_DEVICES}')
    try:
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"expected a device of this machine, got {str(chosen)!r}: {reason_of(error)} {_DEVICES}") from error
    return chosen


def chosen_dtype(dtype: object) -> torch.dtype:
    """The number format, if a model can compute in it.

    Raises:
        ModelError: whole numbers, 8 bits, or no dtype of torch.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise ModelError(f"expected dtype {', '.join(map(str, _DTYPES))}, got {dtype!r}. Give one of these objects.")
    return dtype


def chosen_name(name_or_path: object) -> str:
    """The name or path as text, `~` expanded where it opens a path.

    Raises:
        ModelError: neither text nor path.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not isinstance(name := os.fspath(name_or_path), str) or not name:
        raise ModelError(f"expected the name of a model or a path, got {name_or_path!r}. Give text or a pathlib.Path.")
    path = os.path.expanduser(name)
    try:
        Path(path).is_dir()
    except (OSError, ValueError) as error:
        raise ModelError(f"expected the name of a model or a path, got {name[:40]!r}...: {reason_of(error)[:80]}") from error
    return path


def is_place(name: str) -> bool:
    """Whether this names something on the disk, there or not, rather than a model of a hub."""
    path = Path(name)
    opens_path = name.startswith(("./", "../", "~")) or path.is_absolute() or path.suffix.lower() == ".gguf"
    return path.is_dir() or opens_path or (path.is_file() and (_begins(path) == _GGUF or is_weights_file(path)))


def is_weights_file(path: Path) -> bool:
    """Whether the name is that of one file of a checkpoint."""
    return any(path.match(pattern) for pattern in (*_WEIGHTS, "*.json"))


def weights_at(path: Path) -> Path:
    """The GGUF file or the Hugging Face folder to load.

    Raises:
        ModelError: nothing there, or nothing that is a whole model; what to do about it.
    """
    if path.is_dir():
        return _model_folder(path)
    if not path.exists():
        raise ModelError(f"expected a model folder or a GGUF file, got {str(path)!r}, which does not exist. Check the path.")
    if (begins := _begins(path)) == _GGUF:
        return path
    if path.suffix.lower() == ".gguf":
        pointer = " It may be a pointer of Git LFS: run git lfs pull." if begins == b"vers" else ""
        raise ModelError(
            f"expected a GGUF file, which begins with {_GGUF!r}, got {str(path)!r}, which begins with {begins!r}.{pointer} Get the "
            "file again."
        )
    there = "" if (path.parent / "config.json").is_file() else " (it needs config.json beside the weights)"
    raise ModelError(
        f"expected a model folder or a GGUF file, got the file {str(path)!r}. Give its folder: {str(path.parent)!r}{there}."
    )


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF))
    except OSError as error:
        raise ModelError(f"expected a file that can be read, got {str(path)!r}: {error.strerror}. Check the path.") from error


def _model_folder(path: Path) -> Path:
    here = repr(str(path))
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"expected a whole model, got a PEFT adapter in {here}, made for {_base_of(path)}. Merge it first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(other), and load that; or "
            "remove adapter_config.json, if the weights are merged already."
        )
    weights = [found for pattern in _WEIGHTS for found in path.glob(pattern)]
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not weights:
        if len(ggufs) > 1:
            raise ModelError(
                f"expected a folder with one model, got {here} with {', '.join(g.name for g in ggufs)}. Give one of the files."
            )
        return weights_at(ggufs[0])
    if not (path / "config.json").is_file():
        below = sorted(found.parent for pattern in ("*/config.json", "*/*/config.json") for found in path.glob(pattern))
        got = "without one" if any(path.iterdir()) else "an empty folder"
        cure = (
            f"Give {', '.join(repr(str(b)) for b in below[:3])}."
            if below
            else "Check the path, or copy the model's config.json there."
        )
        raise ModelError(f"expected a Hugging Face model folder with config.json, got {here}, {got}. {cure}")
    if own := _settings(path).get("auto_map"):
        raise ModelError(
            f"expected a model of an architecture that transformers has, got {here} with code of its own ({_named(own)}), which is "
            "not run. Read the code; then load the model yourself with trust_remote_code=True, and hand over "
            "TransformerBridge.boot_transformers(..., "
            'hf_model=model). If transformers has the same architecture, remove "auto_map" from config.json.'
        )
    return path


def _settings(path: Path) -> Facts:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"expected config.json as JSON in {str(path)!r}, got: {reason_of(error)} Get the file again.") from error
    if not isinstance(settings, dict):
        raise ModelError(f"expected config.json with settings in {str(path)!r}, got {str(settings)[:40]!r}. Get the file again.")
    return settings


def _named(auto_map: object) -> str:
    return ", ".join(map(str, auto_map.values())) if isinstance(auto_map, dict) else str(auto_map)


def _base_of(path: Path) -> str:
    try:
        return repr(json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a base model that it does not name"


def has_tokenizer(path: Path) -> bool:
    """Whether a model folder or a GGUF file brings a tokenizer."""
    return path.is_file() or any(next(path.glob(pattern), None) is not None for pattern in _VOCABULARIES)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, else its class, as a sentence."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return said if said.endswith((".", "!", "?")) else f"{said}."
