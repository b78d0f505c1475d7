"""The embedded model's weights, dequantized once and kept: a folder that loads ten times as fast as the GGUF file.

Its name is of what it depends on: the GGUF file's SHA-256, the format of the folder, and the version of transformers, which reads
settings and tokenizer. Its record lists the digest of every file; what does not fit it is never loaded.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from basin_lens import records
from basin_lens.errors import ModelError, StoreError
from basin_lens.files import new_folder
from basin_lens.model.kept import DEQUANTIZED, model_folder, remove
from basin_lens.model.protocol import PreTrainedModel, PreTrainedTokenizerBase
from basin_lens.records import Expected, Unfinished
from basin_lens.values import Facts

_KIND = records.Kind(
    "the dequantized weights", "basin_lens dequantized model 1", "Delete the folder: it is made again.", ModelError
)
_FIELDS: dict[str, Expected] = {"gguf": str, "transformers": str, "quantization": (dict, None), "adds_bos": bool}
_RECORD = "dequantized.json"


@dataclass(frozen=True)
class Dequantized:
    """A folder that transformers loads, and what of the GGUF file it does not hold.

    `quantization`: the settings of the GGUF file's quantization, part of the model's fingerprint. `adds_bos`: whether the file's
    tokenizer puts BOS before a text by itself.
    """

    folder: Path
    quantization: Facts | None
    adds_bos: bool

    def restore(self, weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make what was loaded from the folder what it would be from the GGUF file."""
        if self.quantization is not None:
            weights.config.quantization_config = dict(self.quantization)
        # TransformerLens loads a tokenizer again, with BOS, unless this says that it has BOS. From a GGUF file it cannot, and takes
        # the one that it is given; so it must here.
        tokenizer.init_kwargs["add_bos_token"] = True

    def settle(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """When TransformerLens has the tokenizer: its settings as the GGUF file has them."""
        tokenizer.init_kwargs["add_bos_token"] = self.adds_bos


def dequantized_at(sha256: str) -> Path:
    """The folder for the weights of the GGUF file with this SHA-256, there or not."""
    names = [_KIND.format, sha256, version("transformers")]
    identity = hashlib.blake2b("\x00".join(names).encode(), digest_size=8).hexdigest()
    return model_folder() / f"{DEQUANTIZED}-{identity}"


def find_dequantized(sha256: str) -> Dequantized | None:
    """The kept weights of a GGUF file, proven to be as they were written; None if there are none.

    A damaged folder is said to be so, and removed.

    Raises:
        StoreError: it cannot be removed.
    """
    folder = dequantized_at(sha256)
    if not folder.exists():
        return None
    try:
        return _proven(folder, sha256)
    except ModelError as error:
        remove(folder)
        warnings.warn(f"The dequantized model in the cache is damaged, and is made again: {error}", stacklevel=4)
        return None


def keep_dequantized(sha256: str, read: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Dequantized:
    """Keep the weights of a GGUF file.

    Args:
        sha256: of the file.
        read: reads it, in float32; not called before the folder is known to be writable.

    Raises:
        StoreError: the cache cannot be written. ModelError: what another process wrote there meanwhile is damaged.
    """
    folder = dequantized_at(sha256)
    try:
        with new_folder(folder) as new:
            _write(new, sha256, *read())
    except StoreError:
        if not folder.exists():
            raise
        # Another process made it meanwhile: what is there is loaded.
    return _proven(folder, sha256)


def _write(folder: Unfinished, sha256: str, weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tensors = {name: value.detach().contiguous() for name, value in weights.named_parameters()}  # tied ones once
    if other := sorted(name for name, value in tensors.items() if value.dtype != torch.float32):
        raise ModelError(f"expected weights in float32 from the GGUF file, got {other[0]} in {tensors[other[0]].dtype}.")
    settings = weights.config.to_dict()
    quantization = settings.pop("quantization_config", None)
    facts: Facts = {
        "gguf": sha256,
        "transformers": version("transformers"),
        "quantization": quantization,
        "adds_bos": bool(tokenizer.init_kwargs.get("add_bos_token", False)),
    }
    try:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        tokenizer.save_pretrained(str(folder))
        files = {path.name: records.digest(path) for path in sorted(folder.iterdir())}
        (folder / _RECORD).write_bytes(_KIND.record(facts, files, indent=1))
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"expected a writable cache folder, got {error}. Free space, or set BASIN_LENS_CACHE to another folder."
        ) from error


def _proven(folder: Path, sha256: str) -> Dequantized:
    """What a folder holds, if it is whole, of this file, and nothing was put beside it.

    Raises:
        ModelError: it is not.
    """
    record = _KIND.read(folder / _RECORD, _FIELDS)
    with _KIND.reading(folder):
        # A file more (an adapter, an index of shards) would change what transformers loads.
        if more := sorted({path.name for path in folder.iterdir()} - {*record["files"], _RECORD}):
            raise _KIND.refusal(folder, f"one with {more[0]!r} beside its files")
        if (record["gguf"], record["transformers"]) != (sha256, version("transformers")):
            raise _KIND.refusal(folder, f"those of another file ({record['gguf'][:16]}...)")
    for name, facts in record["files"].items():
        _KIND.check(folder, name, facts)
    return Dequantized(folder, record["quantization"], record["adds_bos"])
