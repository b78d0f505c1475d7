"""`study all` goes on where it was: a plan beside the studies' folders says what they are of, and which are finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import cast

from basin_lens import tables
from basin_lens.cli.options import MeasureOptions, TextOptions
from basin_lens.errors import StoreError
from basin_lens.files import write_file
from basin_lens.locks import is_own
from basin_lens.model import HookedModel, fingerprint, provenance
from basin_lens.records import Kind, digest, is_sealed
from basin_lens.tables import RunTable
from basin_lens.texts import Passage
from basin_lens.values import Facts

PLAN = Kind("the plan of studies", "basin_lens studies 1", "Take it away to start over, or choose another folder.")
_NAME = "plan.json"
_NAMES = {
    "model": "the model",
    "texts": "the texts",
    "measured": "options of measuring",
    "options": "a study's own options",
    "versions": "versions of the package, of torch or of TransformerLens",
}


def plan_of(
    model: HookedModel,
    passages: Sequence[Passage],
    run: RunTable | None,
    own: Mapping[str, object],
    texts: TextOptions,
    how: MeasureOptions,
) -> Facts:
    """What makes two calls the same, as plain JSON.

    Args:
        model: that is studied.
        passages: the texts, if any are given.
        run: a finished run that stands in place of texts; its files hold scores, documents, labels and spans.
        own: options of each study by name, models in place of their names.
        texts, how: what all studies share.
    """
    told = provenance(model)
    files = None if run is None else sorted((name, facts["sha256"]) for name, facts in run.files.items())
    read = ("max_sequences", "k", "seed")
    return {
        "model": {name: told[name] for name in ("name", "fingerprint", "kind", "dtype", "device")},
        "texts": hashlib.blake2b(repr((list(passages), run and run.run, files)).encode(), digest_size=8).hexdigest(),
        "measured": {**{name: getattr(texts, name) for name in read}, **{name: str(value) for name, value in vars(how).items()}},
        "options": {name: _said(options) for name, options in own.items()},
        "versions": {"basin_lens": tables.package_version(), **told["versions"]},
    }


def _said(options: object) -> Facts:
    """A study's own options; a model by its fingerprint, for two may have one name."""
    assert is_dataclass(options) and not isinstance(options, type)
    given = {one.name: (getattr(options, one.name), one.metadata.get("model")) for one in fields(options)}
    return {
        name: fingerprint(cast("HookedModel", value)) if model and value is not None else repr(value)
        for name, (value, model) in given.items()
    }


def refuse_foreign(folder: Path, *, fresh: bool) -> None:
    """Refuse somebody else's file under the name of the plan, before a model is loaded.

    Args:
        folder: of the studies.
        fresh: whether they are to start over: then a plan of ours is overwritten, of whatever version it is.

    Raises:
        StoreError: a file that is no plan of studies, or was changed after it was written.
    """
    path = folder / _NAME
    if not path.exists():
        return
    if not fresh:
        PLAN.read(path, {"plan": dict, "done": dict})
        return
    if not _is_ours(path):
        raise StoreError(
            f"expected the plan of earlier studies as {str(path)!r}, got a file of somebody else's, or one that was changed: it is "
            "not overwritten. Take it away, or choose another folder."
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is a plan of this package's, of any version, as it was written."""
    try:
        with path.open("rb") as file:
            whole = is_sealed(file)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    own = PLAN.format.rpartition(" ")[0]
    return bool(whole) and isinstance(found, dict) and str(found.get("format")).rpartition(" ")[0] == own


def begin(folder: Path, plan: Facts, places: Mapping[str, Path], *, fresh: bool) -> dict[str, str]:
    """Take a folder for these studies; those that an earlier call of the same plan finished there, with their digests.

    Raises:
        StoreError: studies of another plan, of which is said what differs, or a file that is no plan.
    """
    refuse_foreign(folder, fresh=fresh)
    path = folder / _NAME
    done: dict[str, str] = {}
    if path.exists() and not fresh:
        held = PLAN.read(path, {"plan": dict, "done": dict})
        now = json.loads(json.dumps(plan))
        # A plan of which nothing was finished, as where the texts were refused, holds nobody up.
        if held["done"] and (other := next((name for name in _NAMES if held["plan"].get(name) != now[name]), None)):
            raise StoreError(
                f"expected the studies that {str(folder)!r} holds, got others: {_NAMES[other]} differ. Choose another folder, or "
                "start over with --fresh."
            )
        done = {name: told for name, told in held["done"].items() if name in places and _digest(places[name]) == told}
    _write(folder, plan, done)
    return done


def note(folder: Path, plan: Facts, done: dict[str, str], name: str, place: Path) -> None:
    """Say that a study is finished."""
    done[name] = _digest(place) or ""
    _write(folder, plan, done)


def _write(folder: Path, plan: Facts, done: Mapping[str, str]) -> None:
    write_file(folder / _NAME, PLAN.record({"plan": plan, "done": dict(done)}, {}, indent=1))


def _digest(place: Path) -> str | None:
    """Of all files in a study's folder, its report among them; None where there are no results."""
    path = place / "results.json"
    if not path.is_file():
        return None
    files = sorted(file for file in place.rglob("*") if file.is_file() and not is_own(file.name))
    told = [(file.relative_to(place).as_posix(), digest(file)["sha256"]) for file in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()
