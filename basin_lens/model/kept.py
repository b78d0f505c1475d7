"""The user's cache folder: what the package keeps there, listed and removed. Nothing of anybody else's in it is touched."""

import os
import re
import shutil
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from basin_lens.errors import StoreError
from basin_lens.files import clear_leavings, scratch

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEQUANTIZED = "smollm2-135m"
_OURS = re.compile(rf"{re.escape(GGUF_NAME)}|{DEQUANTIZED}-[0-9a-f]{{16}}")


@dataclass(frozen=True)
class Kept:
    """A file or folder in the cache.

    `name`: as it stands there. `size`: in bytes, of all files. `made`: when it was last written (UTC). `of`: what it holds.
    """

    name: str
    path: Path
    size: int
    made: datetime
    of: str

    @classmethod
    def at(cls, path: Path, of: str) -> "Kept":
        """What stands at `path`; links are not followed."""
        inside = [] if path.is_symlink() else path.rglob("*")
        found = [one.lstat() for one in (path, *inside)]
        size = sum(one.st_size for one in found if not stat.S_ISDIR(one.st_mode))
        return cls(path.name, path, size, datetime.fromtimestamp(max(one.st_mtime for one in found), UTC), of)


def cache_folder() -> Path:
    """Where basin_lens keeps the embedded model and reference banks: `BASIN_LENS_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("BASIN_LENS_CACHE") or platformdirs.user_cache_dir("basin_lens"))


def model_folder() -> Path:
    """Where the embedded model's file and its dequantized weights are kept."""
    return cache_folder() / "models"


def kept_models() -> list[Kept]:
    """The embedded model's file and its dequantized weights, as far as they are in the cache; by name."""
    folder = model_folder()
    clear_leavings(folder)
    there = sorted(path for path in folder.glob("*") if _OURS.fullmatch(path.name))
    return [
        Kept.at(path, "SmolLM2-135M-Instruct, Q4_1" + ("" if path.name == GGUF_NAME else ", dequantized to float32"))
        for path in there
    ]


def remove(path: Path) -> None:
    """Take a file or folder away in one step, so that no process sees half of it; one that is gone already stays so.

    Raises:
        StoreError: it cannot be removed.
    """
    try:
        with scratch(path) as aside:
            path.rename(aside / path.name)
    except FileNotFoundError:
        return  # another process did
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            raise StoreError(f"expected a writable cache folder, got {error}. Set BASIN_LENS_CACHE to another folder.") from error
