"""What a reader of the study of basins sees."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.studies.basins.grid import CELL, HOME, HOME_RANDOM, SCORE, SCORE_ISOTROPIC, SCORE_RANDOM, TO_THE_END, Grid
from basin_lens.studies.basins.tests import ABOVE, APART, BASIN, GROWN, GROWN_ISOTROPIC, GROWTH
from basin_lens.studies.framework.declared_tests import ALPHA
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.measurement import spaced_layers
from basin_lens.studies.framework.table_parts import named_rows
from basin_lens.views import Section, curve_panels, grid_map

# In a map: a cell that the two halves agree on, and one that stands in all documents alone.
MARKS = {BASIN: "+", APART: "−"}
ONCE = "·"
_PANELS = 16  # the most that a figure has
KINDS = {HOME: "neighbors", HOME_RANDOM: "random sets"}
LITERATURE = (
    "“Characterizing stable regions in the residual stream of LLMs” (arXiv 2409.17113) moves states behind the first layer from "
    "one text's to another's and finds regions in which the model's output hardly moves, with sharp borders, in trained models and "
    "not in random ones. Closest to it here are the paths to the end of the model: such a region would be contraction that is high "
    "at small scales and falls beyond the border. “Concept Attractors” (arXiv 2601.11575): layers that contract towards concepts "
    "would be cells above 0 in the first map. “Attention sinks and compression valleys” (arXiv 2510.06477) is about all states of "
    "a sequence at once: what a place does to whatever enters it, or a block to some directions everywhere, is in neither of the "
    "two measures here.",
    "None of these regions, attractors and valleys is what is tested here; a no here is no evidence against them.",
)
MEANING = (
    "Above 0: the blocks draw a token's neighbors together more at home than elsewhere, and more than they do other displacements "
    "there (a basin). Below 0: they tell apart what is near home. Compression is 0 for every token if the path is affine, "
    "whatever the place adds or scales."
)


@dataclass(frozen=True)
class Seen:
    """What was found at the cells. `tests`: by measure. `means`, `twin`: other columns' means, and the random twin's."""

    grid: Grid
    values: pd.DataFrame
    tests: Mapping[str, pd.DataFrame]
    means: pd.DataFrame
    twin: pd.DataFrame


def cells_of(seen: Seen) -> pd.DataFrame:
    """Everything that is known of a cell in one row per measure: tests, nulls, the random twin."""
    beside = {
        ABOVE: {
            "score_mean": (SCORE, seen.means),
            "random_sets": (SCORE_RANDOM, seen.means),
            "isotropic": (SCORE_ISOTROPIC, seen.means),
        },
        GROWTH: {"score_mean": (GROWN, seen.means), "isotropic": (GROWN_ISOTROPIC, seen.means)},
    }
    parts = []
    for measure, found in seen.tests.items():
        part = found.copy()
        for name, (column, means) in {**beside[measure], "random_twin": (measure, seen.twin)}.items():
            mine = means[means["score"] == column]
            for end, value in (("", "estimate"), ("_low", "low"), ("_high", "high")):
                held = dict(zip(mine[CELL].itertuples(index=False, name=None), mine[value], strict=True))
                part[f"{name}{end}"] = [held.get(cell, np.nan) for cell in part[CELL].itertuples(index=False, name=None)]
        part["path"] = [
            seen.grid.path_name(int(layer), int(blocks)) for layer, blocks in zip(part["layer"], part["blocks"], strict=True)
        ]
        parts.append(part)
    answer = pd.concat([tables.without_provenance(part) for part in parts], ignore_index=True)
    return tables.with_provenance(answer, seen.values)


def figures_of(cells: pd.DataFrame, seen: Seen) -> dict[str, Figure]:
    """Maps of the shortest paths and of those to the end, curves by path length, contraction against scale."""
    above = tables.select(cells, cells["score"] == ABOVE)
    above = tables.assign(above, mark=_marks(above))
    shortest = seen.grid.shortest
    one = tables.select(above, above["blocks"] == shortest)
    whole = tables.select(above, above["layer"] + above["blocks"] == seen.grid.n_layers)
    scale = min(seen.grid.scales, key=lambda value: abs(np.log(value)))
    shown = above["layer"].isin(_panels(seen))
    paths = tables.select(above, (above["scale"] == scale) & shown)
    twin = tables.with_provenance(seen.twin[(seen.twin["score"] == ABOVE) & (seen.twin["blocks"] == shortest)], cells)
    answer = {
        "compression-by-layer-and-scale": grid_map(one, "layer", "scale", marked="mark", title=_blocks(seen).capitalize()),
        "compression-to-the-end": grid_map(whole, "layer", "scale", marked="mark", title="From the layer to the end of the model"),
        "compression-by-path": curve_panels(paths, "blocks", panel="layer", title=f"Scale {scale:g}"),
    }
    if len(twin):
        answer["random-twin-by-layer-and-scale"] = grid_map(twin, "layer", "scale", title=f"The random twin, {_blocks(seen)}")
    for name, chosen in (
        ("contraction-by-scale", seen.means["blocks"] == shortest),
        ("contraction-by-scale-to-the-end", seen.means["layer"] + seen.means["blocks"] == seen.grid.n_layers),
    ):
        part = seen.means[chosen & seen.means["score"].isin(list(KINDS)) & seen.means["layer"].isin(_panels(seen))]
        part = part.assign(displaced=part["score"].map(KINDS), score=HOME, effect="mean", unit=seen.tests[ABOVE]["unit"].iloc[0])
        answer[name] = curve_panels(
            tables.with_provenance(part, cells), "scale", by="displaced", panel="layer", flat=True, title="Contraction at home"
        )
    return answer


def _panels(seen: Seen) -> list[int]:
    """Layers with panels of their own: all, or as many as there is room for, evenly spaced."""
    layers = seen.grid.layers
    return [layers[place] for place in spaced_layers(len(layers), _PANELS)]


def _cut(seen: Seen) -> str:
    panels = _panels(seen)
    return f" {len(panels)} of the {len(seen.grid.layers)} layers are shown." if len(panels) < len(seen.grid.layers) else ""


def _blocks(seen: Seen) -> str:
    """The shortest paths in words."""
    count = seen.grid.shortest
    return "one block" if count == 1 else f"{count} blocks"


def _marks(cells: pd.DataFrame) -> list[str]:
    return [MARKS.get(row.reads, ONCE if row.p_corrected <= ALPHA else "") for row in named_rows(cells)]


_MARKED = (
    f"Written into a cell: {MARKS[BASIN]} a basin, {MARKS[APART]} tells apart (max-|t| over the grid, and again on "
    f"the documents that did "
    f"not choose); {ONCE} significant over the grid in all documents, not confirmed."
)
_COLUMNS = (
    "layer",
    "path",
    "scale",
    "estimate",
    "low",
    "high",
    "p",
    "p_corrected",
    "explored_p",
    "confirmed_estimate",
    "confirmed_p",
    "reads",
    "score_mean",
    "random_sets",
    "isotropic",
    "isotropic_low",
    "isotropic_high",
    "random_twin",
    "random_twin_low",
    "random_twin_high",
    "n_units",
    "n_tokens",
)


def sections_of(cells: pd.DataFrame, seen: Seen, figures: Mapping[str, Figure]) -> list[Section]:
    """The report's parts."""
    tested = {measure: cells[cells["score"] == measure] for measure in seen.tests}
    shown = {
        measure: part[[name for name in _COLUMNS if part[name].notna().any()]] for measure, part in tested.items() if len(part)
    }
    sections = [
        Section(
            f"Layer by scale, {_blocks(seen)}",
            [
                "Compression less that of random sets, mean over documents.",
                MEANING,
            ],
            figure=figures["compression-by-layer-and-scale"],
            caption=_MARKED,
        )
    ]
    if "random-twin-by-layer-and-scale" in figures:
        sections.append(
            Section(
                "The same of a model that has learned nothing",
                "Random initialization, its own neighbors and random sets, on some of the tokens. The colors have a "
                "scale of their own.",
                figure=figures["random-twin-by-layer-and-scale"],
            )
        )
    sections += [
        Section("Layer by scale, to the end of the model", figure=figures["compression-to-the-end"], caption=_MARKED),
        Section(
            "By path length",
            "The last point of each panel is the path to the end of the model." + _cut(seen),
            figure=figures["compression-by-path"],
            caption="Mean less random sets with 95 % intervals; filled: p at most 0.05 by max-|t| over the grid, all documents.",
        ),
        Section(
            "Every cell of compression",
            "Beside each: the mean compression itself, that of random sets and of isotropic displacements (on a third of the "
            "tokens), and that of the random twin less its random sets (on half of them).",
            table=shown.get(ABOVE),
        ),
        Section(
            f"Contraction at home against scale, {_blocks(seen)}",
            "What the linear part of a block does is the same at every scale (dotted: the level at the smallest one). "
            "A basin in the "
            "plain sense rises above it. Random sets are longer than the neighbors' displacements, so that the same "
            "bend shows in them "
            "at a smaller scale.",
            figure=figures["contraction-by-scale"],
            caption="c(i, i): log variance before less after, around the neighbors' centroid. Mean with 95 % intervals."
            + _cut(seen),
        ),
        Section("Contraction at home against scale, to the end", figure=figures["contraction-by-scale-to-the-end"]),
        Section(
            "Every cell of the growth of contraction",
            "Contraction at home at a scale less that at the smallest one, less the same of random sets.",
            table=shown.get(GROWTH),
        ),
        Section("Beside the literature", LITERATURE),
    ]
    return sections


def remarks_of(cells: pd.DataFrame) -> list[str]:
    """Where basins are and where their opposite is, in sentences."""
    told = []
    for measure, words in ((ABOVE, "Compression"), (GROWTH, "Growth of contraction at home")):
        mine = cells[(cells["score"] == measure) & cells["p"].notna()]
        basins, apart = (mine[mine["reads"] == reads] for reads in (BASIN, APART))
        less = "tell apart what is near home" if measure == ABOVE else "below that of random sets"
        told.append(
            f"{words}: of {len(mine)} cells, {len(basins)} basin{'s' * (len(basins) != 1)}{_at(basins)}; {len(apart)} "
            f"{less}{_at(apart)}."
        )
    above = cells[cells["score"] == ABOVE]
    twin = above["random_twin"]
    if twin.notna().any():
        clear = above[(above["random_twin_low"] > 0) | (above["random_twin_high"] < 0)]
        told.append(
            f"The random twin's cells lie from {twin.min():+.3f} to {twin.max():+.3f} nats, {len(clear)} of "
            f"{int(twin.notna().sum())} with an "
            f"interval without 0 (not corrected); the model's from {above['estimate'].min():+.3f} to "
            f"{above['estimate'].max():+.3f}."
        )
    return told


def _at(cells: pd.DataFrame) -> str:
    """The layers of some cells, with how many at each."""
    if cells.empty:
        return ""
    counts = cells["layer"].value_counts().sort_index()
    return f" (layer {', '.join(f'{layer}: {count}' for layer, count in counts.items())})"


def about_cells(seen: Seen, measured: Measured, tokens: int, twin_tokens: int) -> list[str]:
    """What was measured at the cells, in sentences."""
    grid = seen.grid
    held = seen.values.dropna(subset=[ABOVE])
    fewest, most = _fewest(held), int(held.groupby(CELL).size().max()) if len(held) else 0
    said = [
        f"Grid: layers {', '.join(map(str, grid.layers))}; scales {', '.join(f'{scale:g}' for scale in grid.scales)}; paths of "
        f"{', '.join(map(str, grid.paths))} blocks and {TO_THE_END} of the model: {len(grid.cells)} cells.",
        f"{tokens} tokens at each cell, spread over the documents, {grid.neighbors} neighbors each, random sets beside all "
        f"of them, isotropic displacements beside a third; {twin_tokens} tokens of the random twin. "
        f"{fewest if fewest == most else f'At each cell, {fewest} to {most}'} found a group.",
    ]
    if grid.absent:
        gone = ", ".join(f"{path} from layer {layer}" for layer, path in grid.absent)
        said.append(f"Absent, for they would go beyond the last block: paths of {gone}.")
    if 0 in measured.layers and 0 not in grid.layers:
        said.append("Layer 0 is no part of the grid: a state that enters it is its token alone.")
    return said


def _fewest(held: pd.DataFrame) -> int:
    return int(held.groupby(CELL).size().min()) if len(held) else 0


def flags_of(cells: pd.DataFrame) -> pd.DataFrame:
    """Reasons not to believe a basin: what has learned nothing, or points anywhere, has at least half of it, too."""
    # With what each is compared: the twin less its random sets; isotropic displacements as they are.
    asked = (
        ("the random twin has it too", "random_twin", "estimate"),
        ("isotropic displacements have it too", "isotropic", "score_mean"),
    )
    rows = []
    for measure in dict.fromkeys(cells["score"]):
        basins = cells[(cells["score"] == measure) & (cells["reads"] == BASIN)]
        for name, column, own in asked:
            raised: object = False
            why = "no basin was found that could be asked"
            if len(basins):
                known = basins[basins[column].notna()]
                too = known[(known[f"{column}_low"] > 0) & (known[column] > known[own] / 2)]
                raised = pd.NA if known.empty else bool(len(too))
                why = f"{len(too)} of {len(known)} basins have at least half of it there" if len(known) else "not measured there"
            rows.append({"flag": name, "question": measure, "score": measure, "layer": pd.NA, "raised": raised, "why": why})
    return pd.DataFrame(rows).astype({"layer": "Int64", "raised": "boolean"})
