"""When, with what and by which call a run was made: facts that differ between two runs of the same thing."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from basin_lens.values import Facts

PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformer-lens", "transformers")
_COMMAND = "basin-lens"
_PATIENCE = 10  # seconds


def made_now(loaded: dict[str, str] | None = None) -> Facts:
    """What provenance says of a run's making, as plain JSON.

    Args:
        loaded: what `load_model` was asked for; None where the model was made otherwise.

    Returns:
        `date` (UTC, ISO 8601), `basin_lens` (version), `commit` of a checkout and whether its package was `changed` since (None for
        an installed package), `versions` of what computes, `command` (None but for the command `basin-lens`), and `loaded`.

    Example:
        >>> from basin_lens.tables.making import made_now
        >>> sorted(made_now())
        ['basin_lens', 'changed', 'command', 'commit', 'date', 'loaded', 'versions']
    """
    commit, changed = checkout(Path(__file__).resolve().parents[2])
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "basin_lens": package_version(),
        "commit": commit,
        "changed": changed,
        "versions": versions(),
        "command": command_line(),
        "loaded": loaded,
    }


def package_version() -> str:
    """Version of this package."""
    return str(import_module("basin_lens").__version__)  # whose front page names this room


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def command_line() -> list[str] | None:
    """The words of the `basin-lens` command that runs now, the first without its folder; None in a notebook or another program."""
    started = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "") or ""
    if Path(sys.argv[0] if sys.argv else "").stem == _COMMAND or started.startswith("basin_lens.cli"):
        return [_COMMAND, *sys.argv[1:]]
    return None


@lru_cache
def checkout(root: Path) -> tuple[str | None, bool | None]:
    """The commit of a checkout of this package, and whether files of the package were changed since; None, None for none.

    A repository around an installed package is another project's: the folder itself must be the checkout.
    """
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changed = None if commit is None else _git(root, "status", "--porcelain", "--", "basin_lens")
    return commit, None if changed is None else bool(changed)


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return None
    return done.stdout.strip()
