"""A merger on disk: a sealed record, and beside it the parameters that it names."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from basin_lens import records
from basin_lens.errors import MergeError, StoreError
from basin_lens.files import lock_folder, write_file
from basin_lens.merging.parameters import Parameters
from basin_lens.model import HookedModel, fingerprint, full_name
from basin_lens.values import Facts

RECORD = "merger.json"
_KIND = records.Kind("a saved merger", "basin_lens token merger 2", "Train or calibrate the merger again.")
_FIELDS = {"options": dict, "base": str, "calibrated": bool, "facts": dict}
_WEIGHTS = "merger"


def write_merger(folder: Path, parameters: Parameters, facts: Facts) -> Path:
    """Write record and parameters; a merger that is there stays whole until the new one is.

    Args:
        folder: made if missing.
        parameters: of the merger.
        facts: options, base, whether it is calibrated, and what is known of its making.

    Raises:
        StoreError: the folder cannot be written.
    """
    held = save({name: value.detach().cpu().contiguous() for name, value in parameters.state_dict().items()})
    weights = f"{_WEIGHTS}-{hashlib.blake2b(held, digest_size=8).hexdigest()}.safetensors"
    record = _KIND.record(facts, {weights: records.digest(held)}, indent=1)
    try:
        with lock_folder(folder):
            # The record goes last: it names its weights, so that until then the folder is the old merger.
            write_file(folder / weights, held)
            write_file(folder / RECORD, record)
            for old in folder.glob(f"{_WEIGHTS}-*.safetensors"):
                if old.name != weights:
                    old.unlink()
    except OSError as error:
        raise StoreError(f"expected a folder that can be written, got {str(folder)!r}: {error}. Choose another.") from error
    return folder


@contextmanager
def read_merger(folder: Path, model: HookedModel) -> Iterator[tuple[Facts, Mapping[str, Tensor]]]:
    """The record and the parameters of the merger of a model; what fails inside the block is a damaged merger.

    Raises:
        StoreError: nothing there, not as it was saved, or of another version. MergeError: another model.
    """
    record = _KIND.read(folder / RECORD, _FIELDS)
    if record["base"] != fingerprint(model):
        raise MergeError(
            f"expected the model that the merger in {str(folder)!r} was made for ({record['base']}), got {full_name(model)} "
            f"({fingerprint(model)}). Load that model."
        )
    with _KIND.reading(folder):
        ((weights, listed),) = record["files"].items()
        yield record, load_file(_KIND.check(folder, weights, listed))
