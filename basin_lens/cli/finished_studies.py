"""`study all` goes on where it was: a plan beside the studies' folders says what they are of, and which are finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from basin_lens import tables
from basin_lens.cli.options import MeasureOptions, TextOptions
from basin_lens.errors import StoreError
from basin_lens.files import write_file
from basin_lens.model import HookedModel, provenance
from basin_lens.records import Kind, digest
from basin_lens.texts import Passage
from basin_lens.values import Facts

PLAN = Kind("the plan of studies", "basin_lens studies 1", "Start over with --fresh, or choose another folder.")
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
    run: str | None,
    own: Mapping[str, object],
    texts: TextOptions,
    how: MeasureOptions,
) -> Facts:
    """What makes two calls the same, as plain JSON. `run`: the name of a finished run that stands in place of texts."""
    told = provenance(model)
    read = ("max_sequences", "k", "seed")
    return {
        "model": {name: told[name] for name in ("name", "fingerprint", "kind", "dtype", "device")},
        "texts": hashlib.blake2b(repr((list(passages), run)).encode(), digest_size=8).hexdigest(),
        "measured": {**{name: getattr(texts, name) for name in read}, **{name: str(value) for name, value in vars(how).items()}},
        "options": {name: repr(options) for name, options in own.items()},
        "versions": {"basin_lens": tables.package_version(), **told["versions"]},
    }


def begin(folder: Path, plan: Facts, places: Mapping[str, Path], *, fresh: bool) -> dict[str, str]:
    """Take a folder for these studies; those that an earlier call of the same plan finished there, with their digests.

    Raises:
        StoreError: studies of another plan, of which is said what differs.
    """
    path = folder / _NAME
    done: dict[str, str] = {}
    if path.exists() and not fresh:
        held = PLAN.read(path, {"plan": dict, "done": dict})
        now = json.loads(json.dumps(plan))
        if other := next((name for name in _NAMES if held["plan"].get(name) != now[name]), None):
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
    """Of a study's results; None where there are none."""
    path = place / "results.json"
    return str(digest(path)["sha256"]) if path.is_file() else None
