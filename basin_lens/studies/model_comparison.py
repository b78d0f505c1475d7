"""What changes between two models, or two checkpoints, on the same texts: each with its own neighbors, or with the first one's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import stats, tables
from basin_lens.analyzers import Compression
from basin_lens.capture import Capture, check_layers
from basin_lens.errors import BasinLensError, StudyError
from basin_lens.model import HookedModel, full_name, n_layers
from basin_lens.scoring.comparison import compare
from basin_lens.studies.framework.attempts import attempt, checked_red_flags
from basin_lens.studies.framework.declared_tests import IF_FEW, decide, declared_test, settle
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measurement import COMPRESSION_TOKENS, PER_SEQUENCE, spaced_layers
from basin_lens.studies.framework.random_twin import same_tokens
from basin_lens.studies.framework.runner import make_study
from basin_lens.studies.framework.sign_flags import signs_over_layers
from basin_lens.studies.framework.spec import Declaration, DeclaredTest, Presentation, Results
from basin_lens.studies.framework.study import Study
from basin_lens.studies.framework.table_parts import named_rows, sequence_shown
from basin_lens.studies.framework.units import FEWEST_UNITS, count_units, unit_keys
from basin_lens.studies.framework.wording import opening, sentence
from basin_lens.texts import Texts
from basin_lens.values import Layers, Whole, units_said, whole_numbers
from basin_lens.views import Section, layer_curve, result_curve, token_view

_COLUMN, _SIDES = "compression", ("compression_a", "compression_b")
_PAIRED = (*_SIDES, "difference", "layer_a", "layer_b")  # columns beside those of every table, which no label is called as
# A red flag: texts are fewer than the units that a test needs, so that windows of them are the units.
WINDOWS = "windows of one text are not independent"
_QUESTION = "change"
_SHORTEST = 16  # tokens of a window that is worth reading

SPEC = Declaration(
    name="compare",
    title="What changes between two models on the same texts?",
    question="Does compression change between two models, or two checkpoints, on the same texts?",
    hypothesis=(
        "Declared before looking: compression of the same tokens differs between the two models (either direction), at the layer "
        f"(not 0) chosen on half of the units, tested on the other half. {IF_FEW}"
    ),
    tests=("compression changes from the first model to the second",),
    nulls=("no change: the signs of whole units' differences are flipped",),
    not_tested=(
        "Whether either model has compression above its nulls (study layers).",
        "Layers other than {layers}; other k, metrics and contexts.",
        "{neighbors}",
    ),
)
_OWN = "The change in the map alone: each model has its own neighbors (frozen neighbors ask for that)."
_FROZEN = "Where neighborhoods move: the second model measures the neighbors that the first one found."


@dataclass(frozen=True)
class _Compared:
    """What declared tests ask of it, and the pairs. `windows`: units are windows of texts that are too few."""

    pairs: pd.DataFrame
    capture: Capture
    names: tuple[str, str]
    unit: str
    seed: int
    windows: bool = False

    @property
    def n_units(self) -> int:
        return count_units(self.capture, self.unit)

    @property
    def n_documents(self) -> int:
        return count_units(self.capture, "document")

    @property
    def over(self) -> str:
        """What tests and intervals are over, in words."""
        if not self.windows:
            return units_said(self.unit, self.n_units)
        return f"{units_said('window', self.n_units)} of {units_said('text', self.n_documents)}"


@whole_numbers(StudyError)
def compare_models(
    model_a: HookedModel,
    model_b: HookedModel,
    data: Texts,
    *,
    names: tuple[str, str] | None = None,
    frozen_neighbors: bool = False,
    layers: Layers | Literal["all"] = None,
    k: Whole = 15,
    max_length: Whole = 128,
    compression_tokens: Whole | None = COMPRESSION_TOKENS,
    unit: str = "document",
    seed: Whole = 0,
    progress: bool = True,
) -> Study:
    """Set two models beside one another on the same tokens: curves, the difference with its test, and where in a text it is.

    Args:
        model_a, model_b: two hooked models of the same tokenizer and number of layers, such as a model and its fine-tuned
            checkpoint.
        data: texts as for `analyze`.
        names: what the report calls them; None: their own names, told apart where they are equal.
        frozen_neighbors: the second model measures the first one's neighbors, so that the difference is in the map alone.
        layers: block indices; None: ten, evenly spaced; `"all"`.
        k, max_length: as for `Compression` and `analyze`.
        compression_tokens: at most so many tokens per layer; None: all.
        unit: what is independent: `"document"`, `"sequence"` or a label. Of fewer than 6 documents (one text file), windows of
            `max_length` tokens are the units, under a red flag: they are not independent.
        seed: of every random choice.
        progress: show progress bars.

    Returns:
        a `Study` with the table `change` (mean difference b - a at every layer, in nats, with intervals over units) and the pairs
        of `compare` as `tokens`.

    Raises:
        StudyError: models whose tokenizers or layers differ, fewer than 6 units, or a label as unit that is called as a column of
            the pairs. Others as for `analyze`; all before either model runs.

    Source: design of basin_lens, "Statistics"; `basin_lens.compare`, `stats.before_after`.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> twin = bl.controls.random_twin(model)
        >>> study = bl.studies.compare_models(
        ...     model, twin, list(reference_passages())[::3], layers=[18], max_length=32, compression_tokens=96, progress=False)
        >>> study.tables["change"].layer.tolist()
        [18]
    """
    capture, other = _same_texts(model_a, model_b, data, layers, max_length)
    used = _independent(capture, unit)
    few = None if compression_tokens is None else PER_SEQUENCE
    score = Compression(k=k, queries=compression_tokens, per_sequence=few, nulls=False)
    sides = (model_a, capture), (model_b, other)
    pairs = compare(*sides, on=score, frozen_neighbors=frozen_neighbors, seed=seed, progress=progress)
    # Also where sequences were asked for: several of one document are its windows, whoever chose them.
    windows = used == "sequence" and count_units(capture, "sequence") > count_units(capture, "document")
    held = _Compared(_with_unit(pairs, capture, used), capture, names or _names(model_a, model_b), used, seed, windows)
    change = attempt(lambda part, *_, **__: _change(part, held), held.pairs, "difference", unit=used)
    results = _tested(held)
    (row,) = named_rows(results.findings)
    layer = int(row.layer) if pd.notna(row.layer) else capture.layers[-1]
    figures = _figures(held, change)
    verdict = [opening(results.decision, "Compression changes.", "No reliable change of compression here."), sentence(row, "nats")]
    said = SPEC.said(layers=", ".join(map(str, capture.layers)), neighbors=_FROZEN if frozen_neighbors else _OWN)
    if held.windows:
        said.append(f"Other texts: the units are {held.over}.")
    presentation = Presentation(_sections(held, change, figures, layer), figures, said, tables={"change": change}, verdict=verdict)
    provenance = tables.provenance(held.pairs)
    return make_study(SPEC, results, presentation, about=_about(held, frozen_neighbors), provenance=provenance, tokens=held.pairs)


def _independent(capture: Capture, unit: str) -> str:
    """What tests are over: the unit asked for, or windows where documents are too few for it.

    Raises:
        StudyError: too few of either.
    """
    if unit in _PAIRED:
        raise StudyError(f"expected a label as unit with a name of its own, got {unit!r}, a column of the pairs. Rename the label.")
    there = count_units(capture, unit)
    if there >= FEWEST_UNITS:
        return unit
    if unit != "document":
        raise StudyError(f"expected at least {FEWEST_UNITS} units ({unit}), got {there}. Add texts.")
    windows = count_units(capture, "sequence")
    if windows >= FEWEST_UNITS:
        return "sequence"
    shorter = capture.n_rows // FEWEST_UNITS
    raise StudyError(
        f"expected at least {FEWEST_UNITS} documents, or as many windows of one text, got {units_said('document', there)} with "
        f"{units_said('window', windows)} "
        f"of at most {capture.settings['max_length']} tokens. Add texts"
        + (f", or read shorter windows (max_length={shorter})." if shorter >= _SHORTEST else ".")
    )


def _with_unit(pairs: pd.DataFrame, capture: Capture, unit: str) -> pd.DataFrame:
    """The pairs with the label that is the unit, if one is."""
    if unit_keys(unit) != [unit]:
        return pairs
    return tables.assign(pairs, **{unit: pairs["seq"].map({seq: label[unit] for seq, label in enumerate(capture.labels)})})


def _tested(held: _Compared) -> Results:
    """The declared test, its red flags and the decision."""
    pairs, finding = held.pairs, f"{_COLUMN} changes from {held.names[0]} to {held.names[1]}"
    test = DeclaredTest(finding, _QUESTION, partial(_change, held=held), score="difference")
    findings = settle(SPEC.name, [declared_test(pairs, test.test, held, finding, _QUESTION, "difference")])
    raised = [
        checked_red_flags(pairs, "difference", unit=held.unit, seed=held.seed).assign(question=_QUESTION),
        signs_over_layers([test], findings, pairs, held),
    ]
    if held.windows:
        of_windows = {"flag": WINDOWS, "score": "difference", "layer": pd.NA, "raised": True, "value": float(held.n_documents)}
        these = "this text" if held.n_documents == 1 else "these texts"
        why = f"{held.over} are the units: what is found is of {these}"
        line = pd.DataFrame([{**of_windows, "why": why, "question": _QUESTION}])
        raised.append(line.astype({"layer": "Int64", "raised": "boolean"}))
    flags = pd.concat([part for part in raised if len(part)], ignore_index=True)
    return Results(findings, flags, decide(findings, flags))


def _same_texts(
    model_a: HookedModel, model_b: HookedModel, data: Texts, layers: Layers | Literal["all"], max_length: Whole
) -> tuple[Capture, Capture]:
    """The texts as both models would read them: what cannot be measured is refused before either does.

    Raises:
        StudyError: models of other depths, or whose tokenizers give other tokens.
    """
    depths = n_layers(model_a), n_layers(model_b)
    if depths[0] != depths[1]:
        raise StudyError(
            f"expected two models of the same number of layers, got {depths[0]} and {depths[1]}. Compare single layers of tables: "
            "bl.compare."
        )
    wanted: tuple[int, ...] = tuple(spaced_layers(depths[0]))
    if layers is not None:
        wanted = check_layers(model_a, None if isinstance(layers, str) else layers)
    capture = Capture.plan(model_a, data, layers=wanted, max_length=max_length)
    try:
        theirs = None if capture.passages is None else Capture.plan(model_b, capture.passages, layers=wanted, max_length=max_length)
    except BasinLensError as error:
        raise StudyError(f"expected texts that the second model can read, too, got: {error}") from error
    if theirs is not None and [s.tokens for s in theirs.sequences] != [s.tokens for s in capture.sequences]:
        raise StudyError(
            "expected two models whose tokenizers give the same tokens, got other tokens for the same texts. Compare models of one "
            "tokenizer, such as a model and its checkpoint."
        )
    return capture, same_tokens(capture, model_b, wanted)


def _names(model_a: HookedModel, model_b: HookedModel) -> tuple[str, str]:
    one, other = full_name(model_a), full_name(model_b)
    return (one, other) if one != other else (f"{one} (first)", f"{other} (second)")


def _change(part: pd.DataFrame, held: _Compared) -> pd.DataFrame:
    """Mean difference at each layer."""
    return stats.before_after(part, "difference", unit=held.unit, correction="bh", seed=held.seed)


def _about(held: _Compared, frozen: bool) -> list[str]:
    capture = held.capture
    neighbors = "those of the first model" if frozen else "each model's own"
    most = int(held.pairs.groupby("layer")["difference"].count().max())
    return [
        f"First: {held.names[0]}. Second: {held.names[1]}. The difference is second less first, of the same tokens.",
        f"{capture.n_rows:,} tokens in {units_said('sequence', len(capture.sequences))} of "
        f"{units_said('document', len(set(capture.docs)))}; layers "
        f"{', '.join(map(str, capture.layers))}; at most {most} tokens of a layer have the score in both.",
        f"Neighbors: {neighbors}. Tests and intervals are over {held.over}"
        + (", which are not independent." if held.windows else "."),
    ]


def _figures(held: _Compared, change: pd.DataFrame) -> Mapping[str, Figure]:
    words = dict(zip(_SIDES, held.names, strict=True))
    answer = {"both-by-layer": layer_curve(held.pairs, list(_SIDES), labels=words)}
    if change["estimate"].notna().any():
        title = f"{_COLUMN}: {held.names[1]} less {held.names[0]}"
        # A curve's band is over documents; the test's own intervals are over what it was over.
        answer["difference-by-layer"] = (
            layer_curve(held.pairs, "difference", title=title) if held.unit == "document" else result_curve(change, title=title)
        )
    return answer


def _sections(held: _Compared, change: pd.DataFrame, figures: Mapping[str, Figure], layer: int) -> Sequence[Section]:
    view = token_view(held.pairs, ["difference", *_SIDES], layer, seq=sequence_shown(held.pairs, "difference"))
    return [
        Section(
            "Both models, layer by layer",
            "Mean compression of the same tokens.",
            figure=figures["both-by-layer"],
            caption="Mean over documents" + (" with 95 % intervals." if held.n_documents > 1 else "; of one there is no interval."),
        ),
        Section(
            "The difference, layer by layer",
            f"{held.names[1]} less {held.names[0]}; above 0: the second draws neighborhoods together more.",
            figure=figures.get("difference-by-layer"),
            caption=f"Mean difference with 95 % intervals over {units_said('window' if held.windows else held.unit)}.",
            table=shown(change, "layer", "n_documents"),
        ),
        Section("One text", f"The difference at layer {layer}, token by token, and both scores.", view=view),
    ]
