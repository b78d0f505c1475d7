"""What a study takes in place of texts: the texts, what was measured on them, and how."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import Analyzer
from basin_lens.capture import Bank, Capture
from basin_lens.scoring import KeptNeighbors
from basin_lens.studies.framework.contrast import Contrast
from basin_lens.studies.framework.units import count_units
from basin_lens.texts import Texts
from basin_lens.values import Facts

# What declared tests are of: compression less that of random sets.
HEADLINE = "compression_above_random_sets"
# The scores that every study looks at, the headline first.
SCORES = (HEADLINE, "compression_place", "compression_directions", "contraction", "raw_compression")
# Beside one for each control, so many tokens of a sequence are asked for in correlations within texts: compression is of a sample.
FEWEST_SCORED = 6
# Tokens per layer whose scores are also measured on other points: enough for means over documents.
NULL_TOKENS = 512


@dataclass(frozen=True)
class Measured:
    """Texts, what was measured on them, and how: what a study takes in place of texts.

    `table`: one row per (layer, token), from `analyze`, with a column `contrast` if one was asked for. `neighbors`: those of
    `Contraction`, of all tokens, where the headline score is of some. `bank`: as for `analyze`. `frequency`: share of each token id
    among all tokens of the texts given, whether measured or not. `settings`: plain JSON. `studies`: those whose scores are there.
    `planned`: all sequences given, unread unless a capture was given. `own`: analyzers that the caller gave beside the studies'.
    """

    capture: Capture
    planned: Capture
    table: pd.DataFrame
    neighbors: KeptNeighbors | None
    bank: Bank
    frequency: Mapping[int, float]
    contrast: Contrast | None
    settings: Facts
    studies: tuple[str, ...]
    own: tuple[Analyzer, ...] = ()

    @property
    def unit(self) -> str:
        """What statistics take as independent: `"document"`, `"sequence"` or a label."""
        return str(self.settings["unit"])

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return int(self.settings["seed"])

    @property
    def layers(self) -> list[int]:
        """Layers measured, ascending."""
        return sorted(int(layer) for layer in self.table["layer"].unique())

    @property
    def n_units(self) -> int:
        """How many independent units there are."""
        return count_units(self.capture, self.unit)


# What a study takes: texts, a capture of them, what was measured on them, or a finished run in a folder.
StudyData = Texts | Capture | Measured | tables.RunTable


def study_provenance(measured: Measured) -> Facts:
    """Of the tokens' run, with the study's own settings in it."""
    return {run: {**facts, "study": measured.settings} for run, facts in tables.provenance(measured.table).items()}
