"""A finished run in a folder in place of measuring texts."""

from collections import Counter
from collections.abc import Callable, Sequence

from basin_lens.analyzers import Analyzer
from basin_lens.capture import Bank, Capture
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel, fingerprint
from basin_lens.scoring.token_rows import texts_hash
from basin_lens.studies.framework.contrast import Contrast, refuse_contrast
from basin_lens.studies.framework.integrated import add_integrated_gradients
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.measurement import analyzers_of, chosen_sequences, headline_of
from basin_lens.studies.framework.registry import STUDIES, specs_of_texts
from basin_lens.studies.framework.run_terms import (
    headline_in,
    labels_of,
    notes_of,
    refuse_another_measure,
    refuse_another_start,
    refuse_missing,
    source_of_bank,
    terms_of,
)
from basin_lens.studies.framework.run_texts import capture_again, capture_of, long_enough
from basin_lens.studies.framework.spec import StudySpec
from basin_lens.tables import RunTable
from basin_lens.texts import Texts, reference_passages
from basin_lens.texts.tokens import longest_sequence
from basin_lens.values import Facts, Layers, whole_numbers


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
        texts: those of the run, with its documents, labels and spans; None: its tokens. Needed for words (the linguistic study)
            and spans.
        layers: of the run; None: all.
        unit, contrast, integrated, check, progress: as for `measure`.

    Returns:
        a `Measured`, which every study takes in place of texts. It holds no neighbors: what is said of them is left out. Its
        `settings["notes"]` say what sets it apart from the texts measured.

    Raises:
        StudyError: another model or other texts than the run's, analyzers that it lacks (all are named), a run of something else
            than studies measure (some tokens, changed states, other options of the headline score), a bank that it does not
            describe, fewer than 6 units, a unit or a contrast that it does not have.
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
    refuse_run(run, specs, unit=unit, contrast=contrast, with_texts=texts is not None)
    _refuse_other_model(model, run)
    refuse_another_start(model, run)
    wanted = {column.name for one in analyzers_of(specs, headline) for column in one.columns}
    table = run.load(layers, [name for name in run.scores if name in wanted])
    planned = capture_of(model, run, table) if texts is None else capture_again(model, run, table, texts)
    fewest = max(spec.fewest_tokens for spec in specs)
    capture, short = chosen_sequences(planned, None, 2, int(facts["seed"]), unit, fewest)
    table = long_enough(planned, table, capture, fewest)
    if contrast is not None:
        refuse_contrast(capture, contrast)
    if check is not None:
        check(capture)
    bank, several = _bank_of(model, run), 0
    if integrated and any(spec.integrated_gradients for spec in specs):
        table, several = add_integrated_gradients(model, capture, table, integrated, int(facts["seed"]), progress)
    if contrast is not None:
        table["contrast"] = contrast.values(table)
    settings: Facts = {
        **terms_of(run),
        "partners": headline.partners,
        "per_document": 2,
        "unit": unit,
        "contrast": contrast and contrast.title,
        "sequences_given": len(planned.sequences),
        "sequences_too_short": short,
        "bank": source_of_bank(run),
        "integrated_gradients_sequences": several,
        "own_analyzers": [],
        "from_run": run.run,
        "notes": notes_of(run, specs, contrast, short, fewest),
    }
    frequency = {token: often / planned.n_rows for token, often in Counter(planned.row_token.tolist()).items()}
    return Measured(capture, planned, table, None, bank, frequency, contrast, settings, tuple(studies))


def refuse_run(
    run: RunTable, specs: Sequence[StudySpec], *, unit: str = "document", contrast: Contrast | None = None, with_texts: bool = False
) -> None:
    """Refuse what can be refused of a run before a model is loaded.

    Args:
        run: in place of texts.
        specs: the studies that are to take it.
        unit, contrast: as for `from_run`.
        with_texts: whether the run's texts are given, too.

    Raises:
        StudyError: analyzers that it lacks, scores of something else, a unit or a contrast that it does not have.
    """
    refuse_missing(run, specs)
    refuse_another_measure(run, specs)
    labels = labels_of(run)
    if unit not in ("document", "sequence", *labels):
        raise StudyError(f'expected unit "document", "sequence" or a label of the run, got {unit!r}; labels: {labels}.')
    if contrast is None and (without := [spec.name for spec in specs if spec.contrasted]):
        raise StudyError(f"expected a contrast for the study {without[0]!r}, such as span:IO,S2, got none. Say what to compare.")
    if contrast is not None and contrast.by == "span" and not with_texts:
        raise StudyError("expected the run's texts with a contrast of spans, got its folder alone. Name the texts, too.")
    if contrast is not None and contrast.by not in ("span", *labels):
        raise StudyError(f"expected a label of the run or span as contrast, got {contrast.by!r}; labels: {labels}.")


def _refuse_other_model(model: HookedModel, run: RunTable) -> None:
    told, own = run.provenance["model"], fingerprint(model)
    if own != told["fingerprint"]:
        raise StudyError(
            f"expected the model of the run ({told['name']}, {told['fingerprint'][:8]}), got one with the fingerprint {own[:8]}. "
            "Load that model (--model)."
        )


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


def _bank_of(model: HookedModel, run: RunTable) -> Bank:
    """Where the run's neighbors came from.

    Raises:
        StudyError: from a capture that its folder does not hold.
    """
    facts = run.provenance
    if terms_of(run)["bank"] is None:
        return None
    bos = (facts["capture"].get("bos")) is not None
    length = longest_sequence(model, 256)
    for known in {None, bos}:
        planned = Capture.plan(model, list(reference_passages()), layers=[0], max_length=length, prepend_bos=known)
        if texts_hash(planned) == facts["bank"]["texts"]:
            return "reference"
    raise StudyError(
        "expected a run whose neighbors are of its own texts or of the built-in passages, got one with another capture as bank, "
        "which its folder does not hold. Measure the texts again: studies.measure(..., bank=...)."
    )
