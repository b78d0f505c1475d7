"""The built-in passages as a bank of neighbors."""

import hashlib
import re
import warnings
from pathlib import Path

from basin_lens.capture.record import Capture
from basin_lens.capture.store import FORMAT, model_of
from basin_lens.errors import CaptureError, StoreError
from basin_lens.files import clear_leavings
from basin_lens.model import HookedModel, Kept, cache_folder, check_model, fingerprint, hooked_at, remove, uses_bos
from basin_lens.texts import longest_sequence, reference_passages

_LENGTH = 256  # more than the longest passage has


def planned_reference(model: HookedModel, *, prepend_bos: bool | None = None) -> Capture:
    """The same tokens, unread."""
    length = longest_sequence(model, _LENGTH)
    return Capture.plan(model, list(reference_passages()), layers=[0], max_length=length, prepend_bos=prepend_bos)


def reference_capture(model: HookedModel, *, prepend_bos: bool | None = None, progress: bool = True) -> Capture:
    """The built-in passages under this model: read once, then kept in the user's cache folder by fingerprint.

    A model that bears a caller's hooks gets a bank of its own, which is not kept: its fingerprint does not say what the hooks do.
    What is kept is proven whole when it is taken (half a second for 1 GB of states); a damaged bank is said to be so, and read
    anew.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    check_model(model)
    passages = list(reference_passages())
    length = longest_sequence(model, _LENGTH)
    if hooked_at(model):
        return Capture.from_texts(model, passages, max_length=length, prepend_bos=prepend_bos, progress=progress)
    # The format too: versions that share a cache each have a bank of their own.
    names = [FORMAT, fingerprint(model), str(uses_bos(model, prepend_bos)), str(length), *(p.text for p in passages)]
    identity = hashlib.blake2b("\x00".join(names).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "reference" / identity
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"expected a writable cache folder, got {error}. Set BASIN_LENS_CACHE to another folder.") from error
    if folder.exists():
        try:
            return _kept(folder, model)
        except (StoreError, CaptureError) as error:
            remove(folder)
            warnings.warn(f"The reference bank in the cache is damaged, and is read anew: {error}", stacklevel=2)
    try:
        return Capture.from_texts(model, passages, max_length=length, prepend_bos=prepend_bos, store=folder, progress=progress)
    except StoreError:
        if not folder.exists():
            raise
        return _kept(folder, model)  # another process made it meanwhile


def _kept(folder: Path, model: HookedModel) -> Capture:
    """The bank in a folder, all of it proven.

    Raises:
        StoreError: damaged. CaptureError: of another model.
    """
    capture = Capture.load(folder)
    capture.check_model_is(model)
    capture.check_store()
    return capture


def kept_banks() -> list[Kept]:
    """The reference banks in the cache, by name; of a damaged one it is not said of which model it is."""
    folder = cache_folder() / "reference"
    clear_leavings(folder)
    there = sorted(path for path in folder.glob("*") if re.fullmatch("[0-9a-f]{32}", path.name) and path.is_dir())
    return [Kept.at(path, f"reference bank of {model_of(path) or 'a model that its record does not name'}") for path in there]
