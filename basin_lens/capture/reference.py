"""The built-in passages as a bank of neighbors."""

import hashlib
from typing import Any

from basin_lens import model as door
from basin_lens.capture.record import Capture
from basin_lens.errors import StoreError
from basin_lens.texts import longest_sequence, reference_passages


def reference_capture(model: Any, *, prepend_bos: bool | None = None, progress: bool = True) -> Capture:
    """The built-in passages under this model: read once, then kept in the user's cache folder by fingerprint.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    door.check_model(model)
    passages = list(reference_passages())
    length = longest_sequence(model, 256)
    names = [door.fingerprint(model), str(door.uses_bos(model, prepend_bos)), str(length), *(p.text for p in passages)]
    identity = hashlib.blake2b("\x00".join(names).encode(), digest_size=16).hexdigest()
    folder = door.cache_folder() / "reference" / identity
    if not (folder / "capture.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"expected a writable cache folder, got {error}. Set BASIN_LENS_CACHE to another folder.") from error
        try:
            Capture.from_texts(model, passages, max_length=length, prepend_bos=prepend_bos, store=folder, progress=progress)
        except StoreError:
            if not (folder / "capture.json").is_file():  # else another process was faster: its states are the same
                raise
    return Capture.load(folder)
