"""basin_lens: where does a language model compress?

    passages -> model -> Capture -> Neighbors -> images under a block -> analyzers -> table
    texts/     model/   capture/  neighbors/    transport/              analyzers/   tables/    -> views/
                                  scoring/ conducts all of this: read it first; controls/ destroys structure

    memorize/ plants texts in a model and finds them; codec/ packs text with a model; merging/ merges tokens inside it;
    studies/ compose all

Importing the package imports neither torch nor pandas: names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from basin_lens import analyzers, codec, controls, errors, memorize, merging, stats, studies, tables, views
    from basin_lens.analyzers import ANALYZERS
    from basin_lens.capture import Capture
    from basin_lens.model import load_model
    from basin_lens.scoring import analyze, neighborhood
    from basin_lens.scoring.comparison import compare
    from basin_lens.studies.contrast_study import contrast
    from basin_lens.texts import Passage

_HOMES = {
    "ANALYZERS": "basin_lens.analyzers",
    "Capture": "basin_lens.capture",
    "Passage": "basin_lens.texts",
    "analyze": "basin_lens.scoring",
    "compare": "basin_lens.scoring.comparison",
    "contrast": "basin_lens.studies.contrast_study",
    "load_model": "basin_lens.model",
    "neighborhood": "basin_lens.scoring",
}
_ROOMS = ("analyzers", "codec", "controls", "errors", "memorize", "merging", "stats", "studies", "tables", "views")

__version__ = "0.1.0"
__all__ = [
    "ANALYZERS",
    "Capture",
    "Passage",
    "analyze",
    "analyzers",
    "codec",
    "compare",
    "contrast",
    "controls",
    "errors",
    "load_model",
    "memorize",
    "merging",
    "neighborhood",
    "stats",
    "studies",
    "tables",
    "views",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"basin_lens.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    from basin_lens.values import did_you_mean

    raise AttributeError(
        f"module 'basin_lens' has no attribute {name!r}; it has {', '.join(__all__)}. {did_you_mean(name, __all__)}".rstrip()
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
