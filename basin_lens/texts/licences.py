"""Licence texts on this machine: long, printed word for word in millions of places, and so likely to be memorized."""

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from basin_lens.errors import TextError
from basin_lens.texts.passages import Passage

_NAME = re.compile(r"^(LICEN[CS]E|COPYING|NOTICE)([-._].*)?$", re.IGNORECASE)
_FEWEST = 200  # characters: shorter files only name a licence
_OWNER = re.compile(r"^.*\bcopyright\b.*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Licences:
    """Licence texts found, each wording once, and the files that could not be read (path and reason)."""

    passages: tuple[Passage, ...]
    unreadable: tuple[str, ...]


def find_licences(files: list[Path] | None = None) -> Licences:
    """Licence files of the installed distributions and of Python itself.

    Wordings that differ in nothing but lines about copyright are one: the first is kept.

    Args:
        files: read these instead.

    Returns:
        passages with document `licence/<distribution>`.

    Raises:
        TextError: no licence that could be read.

    Example:
        >>> from basin_lens.texts import find_licences
        >>> len(find_licences().passages) > 0
        True
    """
    passages, unreadable, seen = [], [], set()
    for owner, path in _installed() if files is None else [(file.stem, file) for file in files]:
        try:
            text = " ".join(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            unreadable.append(f"{path}: {error}")
            continue
        wording = hashlib.sha256(" ".join(_OWNER.sub("", path.read_text(encoding="utf-8")).split()).lower().encode()).digest()
        if len(text) >= _FEWEST and wording not in seen:
            seen.add(wording)
            passages.append(Passage(text, doc=f"licence/{owner}"))
    if not passages:
        why = f"; {len(unreadable)} could not be read, such as {unreadable[0]}" if unreadable else ""
        raise TextError(f"expected licence files of at least {_FEWEST} characters, found none{why}. Name files of your own.")
    return Licences(tuple(passages), tuple(unreadable))


def _installed() -> list[tuple[str, Path]]:
    """Distribution and path of each licence file, in a fixed order."""
    found = []
    for place in (sysconfig.get_path("stdlib"), sysconfig.get_config_var("prefix")):
        own = Path(str(place)) / "LICENSE.txt"
        if own.is_file():
            found.append(("python", own))
    for distribution in distributions():
        name = str(distribution.metadata["Name"])
        for file in distribution.files or []:
            if _NAME.match(file.name) and file.suffix not in (".py", ".pyc"):
                found.append((name, Path(str(file.locate()))))
    return sorted(found, key=lambda item: (item[0] != "python", item[0].lower(), str(item[1])))
