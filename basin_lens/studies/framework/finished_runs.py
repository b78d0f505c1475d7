"""A finished run in a folder in place of measuring texts."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from basin_lens.analyzers import Analyzer, Compression
from basin_lens.capture import Bank, Capture
from basin_lens.errors import StudyError, TableError
from basin_lens.model import HookedModel, fingerprint
from basin_lens.scoring.rerun import analyzer_of
from basin_lens.scoring.token_rows import texts_hash
from basin_lens.studies.framework.contrast import Contrast, refuse_contrast
from basin_lens.studies.framework.integrated import add_integrated_gradients
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.measurement import analyzers_of, headline_of
from basin_lens.studies.framework.registry import STUDIES, specs_of_texts
from basin_lens.studies.framework.spec import StudySpec
from basin_lens.studies.framework.units import FEWEST_UNITS, count_units
from basin_lens.tables import RunTable
from basin_lens.texts import Texts, reference_passages
from basin_lens.texts.tokens import TokenSequence, longest_sequence, token_strings
from basin_lens.values import KEYS, Facts, Layers, whole_numbers


@whole_numbers(StudyError)
def from_run(
    model: HookedModel,
    run: RunTable,
    *,
    studies: Sequence[str] = STUDIES,
    texts: Texts | None = None,
    layers: Layers = None,
    unit: str = "document",
    contrast: Contrast | None = None,
    integrated: int = 8,
    check: Callable[[Capture], None] | None = None,
    progress: bool = True,
) -> Measured:
    """What some studies need, taken from a finished run in a folder: no text is measured again.

    Scores are those of the run, with its k, bank and seed. Of the table, the columns that the studies need are read, at the layers
    asked for. What no table holds is measured here: integrated gradients of a few sequences, and what a study measures apart.

    Args:
        model: the run's.
        run: `bl.tables.open(folder)`.
        studies: for which; the run must have their analyzers (`analyzers_for`).
        texts: those of the run, as they were given to it; None: its tokens. Needed for words (the linguistic study) and spans.
        layers: of the run; None: all.
        unit, contrast, integrated, check, progress: as for `measure`.

    Returns:
        a `Measured`, which every study takes in place of texts. It holds no neighbors: what is said of them is left out.

    Raises:
        StudyError: another model or other texts than the run's, analyzers that it lacks (all are named), a bank that it does not
            describe, fewer than 6 units, a contrast that it does not have.
        StoreError: a file of the table that was changed.

    Example:
        >>> import tempfile
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model, texts = bl.load_model(), list(reference_passages())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     needed = bl.studies.analyzers_for("codelength")
        ...     run = bl.analyze(model, texts, needed, layers=[5], max_length=32, out=folder + "/run", progress=False)
        ...     bl.studies.from_run(model, run, studies=["codelength"], progress=False).layers
        [5]
    """
    facts, specs, headline = run.provenance, specs_of_texts(*studies), headline_in(run)
    _refuse_other_model(model, run)
    refuse_missing(run, specs)
    _refuse_contrast(contrast, specs, texts)
    wanted = {column.name for one in analyzers_of(specs, headline) for column in one.columns}
    table = run.load(layers, [name for name in run.scores if name in wanted])
    chosen = tuple(int(layer) for layer in table["layer"].unique())
    capture = _capture_of(model, run, table, chosen) if texts is None else _capture_again(model, run, texts, chosen)
    if (units := count_units(capture, unit)) < FEWEST_UNITS:
        raise StudyError(f"expected at least {FEWEST_UNITS} units ({unit}), got {units} in the run. Analyze more texts.")
    if contrast is not None:
        refuse_contrast(capture, contrast)
    if check is not None:
        check(capture)
    bank, several = _bank_of(model, facts), 0
    if integrated and any(spec.integrated_gradients for spec in specs):
        table, several = add_integrated_gradients(model, capture, table, integrated, int(facts["seed"]), progress)
    if contrast is not None:
        table["contrast"] = contrast.values(table)
    settings = _settings(run, capture, headline)
    settings |= {"unit": unit, "contrast": contrast and contrast.title, "integrated_gradients_sequences": several}
    often = Counter(capture.row_token.tolist())
    frequency = {token: count / capture.n_rows for token, count in often.items()}
    return Measured(capture, capture, table, None, bank, frequency, contrast, settings, tuple(studies))


def _refuse_other_model(model: HookedModel, run: RunTable) -> None:
    told, own = run.provenance["model"], fingerprint(model)
    if own != told["fingerprint"]:
        raise StudyError(
            f"expected the model of the run ({told['name']}, {told['fingerprint'][:8]}), got one with the fingerprint {own[:8]}. "
            "Load that model (--model)."
        )


def _refuse_contrast(contrast: Contrast | None, specs: Sequence[StudySpec], texts: Texts | None) -> None:
    """Refuse none where a study is about one, and spans without the texts, which alone say where they are."""
    if contrast is None and (without := [spec.name for spec in specs if spec.contrasted]):
        raise StudyError(f"expected a contrast for the study {without[0]!r}, such as span:IO,S2, got none. Say what to compare.")
    if contrast is not None and contrast.by == "span" and texts is None:
        raise StudyError("expected the run's texts with a contrast of spans, got its folder alone. Name the texts, too.")


def _settings(run: RunTable, capture: Capture, headline: Compression) -> Facts:
    """What a study says of how its texts were measured."""
    return {
        **{name: getattr(headline, name) for name in ("k", "context", "exclude", "partners")},
        "compression_tokens": headline.queries,
        "seed": int(run.provenance["seed"]),
        "max_sequences": None,
        "per_document": 2,
        "max_length": capture.settings["max_length"],
        "sequences_given": len(capture.sequences),
        "sequences_too_short": 0,
        "bank": run.provenance.get("bank", {}).get("source", "the texts themselves"),
        "own_analyzers": [],
        "from_run": run.run,
    }


def taken(
    model: HookedModel,
    run: RunTable,
    study: str,
    progress: bool,
    options: Mapping[str, object],
    check: Callable[[Capture], None] | None = None,
) -> Measured:
    """What one study needs of a run.

    Raises:
        StudyError: options of measuring, which are the run's own. Others as for `from_run`.
    """
    known = ("texts", "layers", "unit", "contrast", "integrated")
    if wrong := sorted(set(options) - set(known)):
        raise StudyError(
            f"expected options among {', '.join(known)} with a finished run, got {wrong[0]!r}, which is the run's own. Leave it "
            "out, or measure the texts."
        )
    given: dict[str, Any] = dict(options)  # from_run checks what each is
    return from_run(model, run, studies=(study,), progress=progress, check=check, **given)


@whole_numbers(StudyError)
def analyzers_for(*studies: str, k: int = 15) -> list[Analyzer]:
    """The analyzers that a run must have for these studies to take it, as `analyze` takes them.

    Raises:
        StudyError: an unknown study.

    Example:
        >>> import basin_lens as bl
        >>> [type(one).__name__ for one in bl.studies.analyzers_for("codelength")][:2]
        ['Compression', 'Contraction']
    """
    return analyzers_of(specs_of_texts(*studies), headline_of(k, "patched", "sequence"))


def headline_in(run: RunTable) -> Compression:
    """The run's own headline score, whose options are those of the studies' other scores; the default one if it has none."""
    for one in _known(run):
        if isinstance(one, Compression) and HEADLINE in [column.name for column in one.columns]:
            return one
    return headline_of(15, "patched", "sequence")


def refuse_missing(run: RunTable, specs: Sequence[StudySpec]) -> None:
    """Refuse a run without analyzers that studies need.

    Raises:
        StudyError: which are missing, with their columns, and the call that measures them.
    """
    headline, held = headline_in(run), set(run.provenance["analyzers"])
    for spec in specs:
        missing = [one for one in analyzers_of([spec], headline) if one.key not in held]
        if missing:
            columns = [column.name for one in missing for column in one.columns]
            raise StudyError(
                f"expected a run with the analyzers of the study {spec.name!r}, got one without "
                f"{', '.join(one.key for one in missing)} (columns {', '.join(columns)}). Make it anew: basin-lens analyze ... "
                f"--for {','.join(each.name for each in specs)}, or bl.analyze(model, texts, bl.studies.analyzers_for("
                f"{', '.join(repr(each.name) for each in specs)}), out=...)."
            )


def _known(run: RunTable) -> list[Analyzer]:
    """The run's analyzers, but those of somebody's own."""
    found = []
    for key in run.provenance["analyzers"]:
        try:
            found.append(analyzer_of(key))
        except TableError:
            continue
    return found


def _capture_of(model: HookedModel, run: RunTable, table: pd.DataFrame, layers: tuple[int, ...]) -> Capture:
    """The run's tokens as a capture that was not read, without texts."""
    first = table[table["layer"] == layers[0]]
    labels = [name for name in run.columns if name not in (*KEYS, "span") and name not in run.scores]
    parts = [part for _, part in first.groupby("seq", sort=False)]
    sequences = [
        TokenSequence(
            tuple(part["token_id"].tolist()),
            int(part["passage"].iloc[0]),
            tuple(part["start"].tolist()),
            tuple(part["end"].tolist()),
        )
        for part in parts
    ]
    held = [{name: value for name in labels if (value := part[name].iloc[:1].astype(object).item()) is not None} for part in parts]
    capture = Capture(
        sequences=sequences,
        passages=None,
        docs=[str(part["doc"].iloc[0]) for part in parts],
        labels=held,
        strings=token_strings(model, (token for one in sequences for token in one.tokens)),
        layers=layers,
        model=run.provenance["model"],
        settings=dict(run.provenance["capture"]),
    )
    _refuse_other_texts(capture, run)
    return capture


def _capture_again(model: HookedModel, run: RunTable, texts: Texts, layers: tuple[int, ...]) -> Capture:
    """The texts, cut as the run cut them."""
    told = run.provenance["capture"]
    bos = told.get("bos") is not None
    capture = Capture.plan(model, texts, layers=list(layers), max_length=int(told["max_length"]), prepend_bos=bos)
    _refuse_other_texts(capture, run)
    return capture


def _refuse_other_texts(capture: Capture, run: RunTable) -> None:
    if texts_hash(capture) != run.provenance["texts"]:
        raise StudyError(
            f"expected the texts of the run in {str(run.folder)!r}, got {capture.n_rows} tokens whose hash is another (the run has "
            f"{run.n_rows}). Give the texts that it was made of, or none."
        )


def _bank_of(model: HookedModel, facts: Facts) -> Bank:
    """Where the run's neighbors came from.

    Raises:
        StudyError: from a capture that its folder does not hold.
    """
    told = facts.get("bank")
    if told is None or told["source"] == "the texts themselves":
        return None
    bos = (facts["capture"].get("bos")) is not None
    length = longest_sequence(model, 256)
    for known in {None, bos}:
        planned = Capture.plan(model, list(reference_passages()), layers=[0], max_length=length, prepend_bos=known)
        if texts_hash(planned) == told["texts"]:
            return "reference"
    raise StudyError(
        "expected a run whose neighbors are of its own texts or of the built-in passages, got one with another capture as bank, "
        "which its folder does not hold. Measure the texts again: studies.measure(..., bank=...)."
    )
