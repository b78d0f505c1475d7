"""How a finished run was measured: what a study can take as it is, what it must name, and what it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from basin_lens.analyzers import Analyzer, Compression
from basin_lens.errors import StudyError, TableError
from basin_lens.model import HookedModel, uses_bos
from basin_lens.scoring.rerun import analyzer_of
from basin_lens.studies.framework.contrast import Contrast
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.measurement import analyzers_of, headline_of
from basin_lens.studies.framework.spec import StudySpec
from basin_lens.tables import RunTable
from basin_lens.values import TAKEN, Facts, whole_or_none

_OWN_TEXTS = "the texts themselves"
_ANEW = "Make it anew with basin-lens analyze --for, or measure the texts."


def headline_in(run: RunTable) -> Compression:
    """The run's own headline score, whose options are those of the studies' other scores; the default one if it has none."""
    for key in run.provenance["analyzers"]:
        try:
            one = analyzer_of(key)
        except TableError:  # somebody's own
            continue
        if isinstance(one, Compression) and HEADLINE in [column.name for column in one.columns]:
            return one
    return headline_of(15, "patched", "sequence")


def terms_of(run: RunTable) -> Facts:
    """The options of `measure` under which the run was made, by name. `bank`: `"reference"` stands for any other capture."""
    headline, facts = headline_in(run), run.provenance
    return {
        **{name: getattr(headline, name) for name in ("k", "context", "exclude")},
        "compression_tokens": headline.queries,
        "bank": None if source_of_bank(run) == _OWN_TEXTS else "reference",
        "max_length": facts["capture"]["max_length"],
        "max_sequences": None,
        "seed": int(facts["seed"]),
    }


def source_of_bank(run: RunTable) -> str:
    """Where the run's neighbors came from, in words."""
    return str((run.provenance.get("bank") or {}).get("source", _OWN_TEXTS))


def labels_of(run: RunTable) -> list[str]:
    """Labels of the run's texts."""
    return sorted(name for name in run.columns if name not in TAKEN and name not in run.scores)


def refuse_other_terms(run: RunTable, given: Mapping[str, object]) -> None:
    """Refuse options of `measure` that are not those of the run; equal ones change nothing.

    Args:
        run: in place of texts.
        given: options by name, those alone that somebody gave.

    Raises:
        StudyError: one that differs, or that a run cannot have.
    """
    held = terms_of(run)
    for name, value in given.items():
        if name not in held:
            raise StudyError(
                f"expected options among {', '.join(held)} with a finished run, as it was made, got {name!r}. Leave it out, or "
                "measure the texts."
            )
        number = whole_or_none(value)
        plain = value if number is None else number
        if type(plain) is not type(held[name]) or plain != held[name]:
            raise StudyError(
                f"expected {name} {held[name]!r}, which is the run's own, got {plain!r}. Leave it out, or measure the texts."
            )


def refuse_another_measure(run: RunTable, specs: Sequence[StudySpec]) -> None:
    """Refuse a run of something else than what studies say they measure. Needs no model.

    Raises:
        StudyError: some tokens alone were scored, states were changed, or the headline score has options of its own.
    """
    facts, headline = run.provenance, headline_in(run)
    told = facts["capture"]
    queries = facts.get("queries", "all")
    reasons = (
        None if queries == "all" else f"one of {queries} (queries=)",
        None
        if told.get("states_of_model", True) and not told.get("controls")
        else "one whose states or tokens were changed before",
        None if facts["model"].get("hooks") is None else "one of a model that bore the caller's hooks",
        None if not str(facts.get("neighbors", "")).startswith("frozen") else "one with the neighbors of another run",
        _other_headline(headline),
        None
        if headline.partners == "texts" or all(spec.contrasted for spec in specs)
        else 'one whose compression has partners from the bank (partners="bank"), as the contrast study alone has',
    )
    if (why := next((reason for reason in reasons if reason), None)) is not None:
        raise StudyError(
            f"expected a run of all its tokens, of the model's own states, with the scores that the study "
            f"{specs[0].name!r} is about, got {why}. {_ANEW}"
        )


def _other_headline(headline: Compression) -> str | None:
    """Options of the headline score that no study measures with; None: there are none."""
    usual = headline_of(headline.k, headline.context, headline.exclude, headline.queries, headline.partners)
    apart = [one.name for one in fields(headline) if getattr(headline, one.name) != getattr(usual, one.name)]
    if not apart:
        return None
    said = ", ".join(f"{name}={getattr(headline, name)!r} in place of {getattr(usual, name)!r}" for name in apart)
    return f"one whose headline score has {said}"


def refuse_another_start(model: HookedModel, run: RunTable) -> None:
    """Refuse texts that began otherwise than a study has the model read them.

    Raises:
        StudyError: with a beginning-of-sequence token where the model has none by default, or without one.
    """
    told, usual = run.provenance["capture"], uses_bos(model, None)
    if told.get("source") == "texts" and told.get("bos") != usual:
        got, want = ("without it" if token is None else f"with token {token}" for token in (told.get("bos"), usual))
        raise StudyError(
            f"expected a run whose sequences begin as the model's own do ({want}), got one {got} (prepend_bos=). {_ANEW}"
        )


def refuse_missing(run: RunTable, specs: Sequence[StudySpec]) -> None:
    """Refuse a run without analyzers that studies need.

    Raises:
        StudyError: which are missing, with their columns, and the call that measures them.
    """
    headline, held = headline_in(run), set(run.provenance["analyzers"])
    for spec in specs:
        missing: list[Analyzer] = [one for one in analyzers_of([spec], headline) if one.key not in held]
        if missing:
            columns = [column.name for one in missing for column in one.columns]
            raise StudyError(
                f"expected a run with the analyzers of the study {spec.name!r}, got one without "
                f"{', '.join(one.key for one in missing)} (columns {', '.join(columns)}). Make it anew: basin-lens analyze ... "
                f"--for {','.join(each.name for each in specs)}, or bl.analyze(model, texts, bl.studies.analyzers_for("
                f"{', '.join(repr(each.name) for each in specs)}), out=...)."
            )


def notes_of(run: RunTable, specs: Sequence[StudySpec], contrast: Contrast | None, short: int, fewest: int) -> list[str]:
    """What sets studies of the run apart from studies of its texts, in sentences, for provenance and report.

    Args:
        run: in place of texts.
        specs: the studies.
        contrast: that is asked for.
        short: sequences that were left out, which have fewer tokens than `fewest`.
    """
    facts, headline = run.provenance, headline_in(run)
    said = [
        f"Scores are those of the finished run {run.run}, made with the seed {facts['seed']}; its texts were not measured again."
    ]
    if short:
        beside = "neighbors and groups were found among them, too" if source_of_bank(run) == _OWN_TEXTS else "groups were, too"
        said.append(f"{short} sequences of fewer than {fewest} tokens are left out here; in the run, {beside}.")
    search = facts.get("search") or {}
    if not search.get("exact", True):
        recall = [float(value) for value in (search.get("recall") or {}).values()]
        found = f", with a recall of {min(recall):.3f} or more" if recall else ""
        said.append(f"Neighbors were searched approximately{found}.")
    if (dtype := facts["capture"].get("dtype", facts["model"].get("dtype"))) != facts["model"].get("dtype"):
        said.append(
            f"States were kept as {dtype}, not as the model's {facts['model'].get('dtype')}: scores are of them so rounded."
        )
    if contrast is not None and headline.queries is not None and any(spec.contrasted for spec in specs):
        said.append(
            f"Compression is of the run's own sample ({headline.queries:,} tokens of a layer), not of the two kinds first, with "
            f"partners from the {'bank' if headline.partners == 'bank' else 'texts'}."
        )
    return said
