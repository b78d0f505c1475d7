"""A run again, from a supplement (`tables.bundle`): the same tokens, analyzers and settings, and how far the numbers are apart."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.analyzers import ANALYZERS, Analyzer
from basin_lens.analyzers.control import Control
from basin_lens.capture import Bank, Capture, read_states
from basin_lens.errors import ModelError, TableError
from basin_lens.model import HookedModel, fingerprint, provenance
from basin_lens.records import Expected
from basin_lens.records import fields as checked
from basin_lens.scoring.analysis import score
from basin_lens.scoring.bank import is_reference
from basin_lens.scoring.request import Request
from basin_lens.scoring.token_rows import rows_at_places
from basin_lens.tables.bundles import tokens_hash
from basin_lens.texts import TokenSequence
from basin_lens.texts.tokens import token_strings
from basin_lens.values import Facts

_CLASSES: tuple[type[Any], ...] = (*ANALYZERS, Control)
_ALLOWED = {cls.__name__: cls for cls in _CLASSES}
# Two numbers are the same that are apart by no more than this share of the larger: other processors and versions round otherwise.
SAME = 1e-3
# Or by no more than this share of the column's median size: a score is a difference of terms of that size, whose rounding (1e-7 in
# float32, a thousand times that behind a few dozen blocks) stays where they cancel, however small the score.
FLOOR = 1e-4
_FACTS: dict[str, Expected] = {"model": dict, "capture": dict, "layers": [int], "analyzers": [str], "seed": int, "texts": str}
_CURE = "Run it with the command or the notebook that made the table."


@dataclass(frozen=True)
class Rerun:
    """One run of a supplement, ready to be run again.

    `name`: of the run. `facts`: its provenance. `analyzers`: as they were. `sequences`: tokens, documents and labels. `bank`: the
    same of the bank, if it was a capture of the caller's, and `bank_settings` how that was read. `asked`: rows that were scored;
    None: all.
    """

    name: str
    facts: Facts
    analyzers: tuple[Analyzer, ...]
    sequences: tuple[Facts, ...]
    bank: tuple[Facts, ...] | None = None
    bank_settings: Facts | None = None
    asked: Bool[np.ndarray, " rows"] | None = None


def planned(bundle: tables.Bundle, run: str) -> Rerun:
    """One run of a supplement, checked: everything that makes it impossible to repeat is refused here.

    Raises:
        TableError: tokens are missing, some were scored and it is not known which, an analyzer or a step that the supplement
            cannot name, or a fact that is missing or something else than `bundle` writes.
    """
    facts, held = tables.provenance(bundle.table).get(run), bundle.runs.get(run)
    if facts is None or held is None:
        raise TableError(f"expected a run of the supplement, got {run!r}; it has {list(bundle.runs)}.")
    check_facts(facts)
    capture = facts.get("capture") or {}
    reasons = [
        held["why"],
        None if held["sequences"] else "no tokens",
        None
        if facts.get("queries", "all") == "all" or facts.get("asked")
        else f"only some tokens were scored ({facts['queries']}), not known which",
        None if not str(facts.get("neighbors", "")).startswith("frozen") else "its neighbors were those of another run",
        None if not capture.get("controls") else "its states or tokens were changed before",
        None if (facts.get("model") or {}).get("hooks") is None else "the model bore hooks of the caller",
    ]
    why = next((reason for reason in reasons if reason), None)
    if why is not None:
        raise TableError(f"expected a run that its supplement describes in full, got one of which it does not: {why}. {_CURE}")
    sequences = tuple(held["sequences"])
    if tokens_hash([one["tokens"] for one in sequences]) != facts.get("texts"):
        raise TableError(
            f"expected the tokens of run {run}, got others: their hash is not {facts.get('texts')!r}. Ask for the file again."
        )
    _check(facts, _FACTS)
    _check(facts["model"], {"fingerprint": str}, " of its model")
    if not facts["layers"] or not facts["analyzers"]:
        raise TableError(f"expected a run that its supplement describes in full, got one without layers or analyzers. {_CURE}")
    analyzers = tuple(analyzer_of(key) for key in facts["analyzers"])
    bank = _bank_of(facts, held)
    settings = None if bank is None else held.get("bank_settings") or facts["capture"]
    return Rerun(run, facts, analyzers, sequences, bank, settings, _asked(facts, sequences))


def check_facts(facts: Facts) -> None:
    """Refuse facts of a run, as a supplement has them, that are something else than `bundle` writes; some may be missing.

    Raises:
        TableError: which one.
    """
    kinds: dict[str, Expected] = {**_FACTS, **dict.fromkeys(("bank", "made"), (dict, None)), "columns": dict}
    kinds |= dict.fromkeys(("queries", "neighbors", "asked"), (str, None))
    _check(facts, {name: kind for name, kind in kinds.items() if name in facts})
    inner: dict[str, Expected] = {"versions": (dict, None), "loaded": (dict, None), "command": (list, None)}
    made = facts.get("made") or {}
    _check(made, {name: kind for name, kind in inner.items() if name in made}, " of its making")
    bank = facts.get("bank") or {}
    _check(bank, {name: str for name in ("source", "texts") if name in bank}, " of its bank")


def _check(facts: Facts, expected: Mapping[str, Expected], whose: str = "") -> None:
    try:
        checked(facts, expected)
    except ValueError as error:
        raise TableError(
            f"expected a run that its supplement describes in full, got one with {error}{whose} in its provenance. {_CURE}"
        ) from error


def _bank_of(facts: Facts, held: Facts) -> tuple[Facts, ...] | None:
    """Tokens, documents and labels of a bank of the caller's, if they are in the supplement."""
    bank = tuple(held.get("bank") or ())
    if not bank:
        return None
    if tokens_hash([one["tokens"] for one in bank]) != (facts.get("bank") or {}).get("texts"):
        raise TableError("expected the tokens of the run's bank, got others: their hash is another. Ask for the file again.")
    return bank


def _asked(facts: Facts, sequences: Sequence[Facts]) -> Bool[np.ndarray, " rows"] | None:
    """The rows that were scored; None: all."""
    if facts.get("asked") is None:
        return None
    try:
        return rows_at_places(facts["asked"], sum(len(one["tokens"]) for one in sequences)).numpy()
    except ValueError as error:
        raise TableError(f"expected places of the run's tokens as `asked`, got {str(facts['asked'])[:80]!r}. {_CURE}") from error


def analyzer_of(key: str) -> Analyzer:
    """The analyzer that a key describes. Only this package's classes with plain values are made: a key is read, never run.

    Raises:
        TableError: an analyzer of somebody's own, or options that are no plain values.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.scoring.rerun import analyzer_of
        >>> analyzer_of(bl.analyzers.Contraction(k=7).key).k
        7
    """
    try:
        found = _value(ast.parse(key, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise TableError(f"expected analyzers of this package with plain options, got {key[:80]!r}. {_CURE}") from error
    if not isinstance(found, Analyzer) or found.key != key:
        raise TableError(f"expected an analyzer, got {key[:80]!r}. {_CURE}")
    return found


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.args:
            raise ValueError("no plain call")
        kind = _ALLOWED[node.func.id]
        given = {str(word.arg): _value(word.value) for word in node.keywords}
        fixed = {each.name for each in fields(kind) if not each.init}  # said in a key, and the same for all of the class
        return kind(**{name: value for name, value in given.items() if name not in fixed})
    return ast.literal_eval(node)


def run_again(model: HookedModel, rerun: Rerun, *, batch_size: int | None = None, progress: bool = True) -> pd.DataFrame:
    """The table of the run, made anew.

    Args:
        model: with the run's fingerprint.
        rerun: from `planned`.
        batch_size, progress: as for `analyze`.

    Raises:
        ModelError: another model.
        TableError: neighbors came from a bank that is not in the supplement. Both before the model reads anything.
    """
    wanted, found = (rerun.facts.get("model") or {}).get("fingerprint"), fingerprint(model)
    if wanted != found:
        raise ModelError(f"expected the run's model (fingerprint {wanted}), got {found}. Name that model with --model.")
    layers = tuple(int(layer) for layer in rerun.facts["layers"])
    capture = _capture(model, rerun.sequences, layers, rerun.facts["capture"])
    neighbors: Bank = None
    if rerun.bank is not None:
        planned_bank = _capture(model, rerun.bank, layers, rerun.bank_settings or {})
        neighbors = read_states(model, planned_bank, batch_size=batch_size, progress=progress)
    elif (bank := rerun.facts.get("bank") or {}).get("source") == "another capture":
        neighbors = "reference"
        if not is_reference(model, capture, str(bank.get("texts"))):
            raise TableError(
                "expected neighbors from the built-in passages, got a run with a bank of its own, which is not in the supplement "
                f"(bundle(..., bank=capture) puts it there). {_CURE}"
            )
    request = Request(
        list(rerun.analyzers),
        layers=layers,
        bank=neighbors,
        queries=rerun.asked,
        seed=int(rerun.facts["seed"]),
        batch_size=batch_size,
        progress=progress,
    )
    return score(model, capture, request).table


def _capture(model: HookedModel, held: Sequence[Facts], layers: tuple[int, ...], settings: Facts) -> Capture:
    """Sequences of a supplement as a capture, unread."""
    sequences = [_sequence(one) for one in held]
    return Capture(
        sequences=sequences,
        passages=None,
        docs=[one["doc"] for one in held],
        labels=[dict(one["labels"]) for one in held],
        strings=token_strings(model, (token for one in sequences for token in one.tokens)),
        layers=layers,
        model=provenance(model),
        settings={**settings, "source": "tokens"},
    )


def _sequence(one: Facts) -> TokenSequence:
    none = (-1,) * len(one["tokens"])
    return TokenSequence(tuple(one["tokens"]), int(one["passage"]), none, none)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """How far two runs of the same thing are apart, column by column.

    Args:
        before: rows of one run; those that a reader left out are not compared.
        after: the same run made anew, with all its rows.

    Returns:
        a row per score: `column`, `compared` (values in both), `largest_difference` (absolute, in the column's unit; NaN without
        values), `scale` (median absolute value before, of those that are not 0), `apart` (values further apart than `SAME` of the
        larger one and than `FLOOR` of the scale), `only_one` (values that are NaN or infinite in one of the two alone).

    Raises:
        TableError: rows of `before` that `after` lacks, or no score that both have.

    Example:
        >>> import pandas as pd
        >>> from basin_lens import tables
        >>> from basin_lens.scoring.rerun import differences
        >>> rows = pd.DataFrame({"run": "r", "layer": 0, "seq": 0, "pos": [0, 1], "a": [1.0, 2.0]})
        >>> table = tables.described(rows, {"r": tables.Provenance(columns={"a": tables.Column("nats")})})
        >>> differences(table, tables.assign(table, a=[1.0, 2.5]))["largest_difference"].tolist()
        [0.5]
    """
    keys = ["layer", "seq", "pos"]
    names = [name for name in tables.scores(before) if name in after.columns]
    if not names:
        raise TableError(f"expected a score of both runs to compare, got none ({', '.join(tables.scores(before))} before). {_CURE}")
    joined = before[[*keys, *names]].merge(after[[*keys, *names]], on=keys, how="left", suffixes=("", "|again"), indicator=True)
    if not (joined["_merge"] == "both").all():
        raise TableError("expected the rows of the run, got others (layer, seq and pos). Compare with the table as it was made.")
    lines = []
    for name in names:
        old, new = joined[name].to_numpy(float), joined[f"{name}|again"].to_numpy(float)
        both = np.isfinite(old) & np.isfinite(new)
        alike = both | (np.isnan(old) & np.isnan(new)) | (old == new)  # an infinite value is like itself alone
        far, size = np.abs(old[both] - new[both]), np.maximum(np.abs(old[both]), np.abs(new[both]))
        there = np.abs(old[both])[old[both] != 0]
        scale = float(np.median(there)) if len(there) else np.nan
        lines.append(
            {
                "column": name,
                "compared": int(both.sum()),
                "largest_difference": float(far.max()) if both.any() else np.nan,
                "scale": scale,
                "apart": int((far > np.maximum(SAME * size, FLOOR * np.nan_to_num(scale))).sum()),
                "only_one": int((~alike).sum()),
            }
        )
    return pd.DataFrame(lines, columns=["column", "compared", "largest_difference", "scale", "apart", "only_one"])
