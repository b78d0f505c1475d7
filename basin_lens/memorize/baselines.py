"""What is known to tell memorized texts, so that anything new stands beside it. Every column is higher for memorized texts.

With l_t = log p(x_t | x_<t) of a text's tokens from position 1 on, in nats:

    log_likelihood = mean l_t                                  (the "loss" baseline; Yeom et al. 2018)
    zlib           = mean l_t / bytes of zlib(text)            (Carlini et al. 2021)
    lowercase      = - mean l_t / mean l_t of the text in lower case: -1 where case makes no difference  (Carlini et al. 2021)
                     of a text cut into several sequences, both of the sequence's own part of it
    reference      = mean l_t - mean l_t of the reference model     (Carlini et al. 2021)
    min_k          = mean of the lowest 20 % of l_t            (Shi et al. 2024)
    min_k_plus     = mean of the lowest 20 % of (l_t - mu_t) / sigma_t    (Zhang et al. 2024; see `StandardizedLikelihood`)
    agreement      = share of tokens that are the model's own guess
"""

import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from basin_lens import tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError, TableError
from basin_lens.values import whole_numbers

LOSS_BASELINES = ("log_likelihood", "zlib", "lowercase", "min_k", "min_k_plus", "agreement")
MIN_K = 0.2


def likelihood_baselines(
    table: pd.DataFrame,
    texts: Sequence[str],
    *,
    lowercase: pd.DataFrame | None = None,
    reference: pd.DataFrame | None = None,
    share: float = MIN_K,
) -> pd.DataFrame:
    """The baselines that follow from the forward pass already made: one row per sequence.

    Args:
        table: from `analyze` with `Surprisal`; with `Agreement` and `StandardizedLikelihood` for their baselines. One layer of it
            is read.
        texts: the text of each passage of the table.
        lowercase: the same analysis of the texts in lower case (same passages).
        reference: the same analysis of the same texts by a reference model.
        share: of tokens that Min-K% looks at.

    Returns:
        `passage, doc, seq`, the table's labels, and the columns above (those whose inputs are given).

    Raises:
        TableError: other sequences in the tables, missing columns, a share outside (0, 1]; texts in several sequences without
            `start` and `end`, which say what of a text is in which.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"passage": 0, "doc": "a", "seq": 0, "pos": [0, 1, 2], "surprisal": [float("nan"), 1.0, 3.0]})
        >>> float(bl.memorize.likelihood_baselines(table, ["a cat"]).log_likelihood[0])
        -2.0
    """
    if not 0 < share <= 1:
        raise TableError(f"expected a share of tokens in (0, 1], got {share}.")
    rows = _one_layer(table)
    groups = rows.groupby("seq", sort=True)
    answer = groups[["passage", "doc", "seq", *_labels(rows)]].first()
    mean = -groups["surprisal"].mean()
    answer["log_likelihood"] = mean
    parts = _parts(rows, answer, texts)
    answer["zlib"] = mean / [
        len(zlib.compress(texts[passage][start:end].encode("utf-8")))
        for passage, (start, end) in zip(answer["passage"], parts, strict=True)
    ]
    if lowercase is not None:
        answer["lowercase"] = -mean / -_lowercase_mean(lowercase, answer, texts, parts)
    if reference is not None:
        answer["reference"] = mean + _mean_of(reference, answer, "seq", "the reference model")
    answer["min_k"] = groups["surprisal"].apply(lambda x: lowest_mean(-x.to_numpy(float), share))
    if "standardized_likelihood" in rows:
        answer["min_k_plus"] = groups["standardized_likelihood"].apply(lambda x: lowest_mean(x.to_numpy(float), share))
    if "agreement" in rows:
        answer["agreement"] = groups["agreement"].mean()
    return answer.reset_index(drop=True)


def lowest_mean(values: Float[np.ndarray, " tokens"], share: float) -> float:
    """Mean of the lowest `share` of the values that are there (at least one)."""
    held = np.sort(values[np.isfinite(values)])
    return float(held[: max(1, int(len(held) * share))].mean()) if len(held) else float("nan")


@whole_numbers(StudyError)
def sequence_states(capture: Capture, layer: int) -> Float[np.ndarray, "sequences d"]:
    """Mean of the states that enter a block over a sequence's tokens from position 1 on."""
    states = capture.resid_pre(layer).double()
    own = capture.row_pos > 0
    sums = np.zeros((len(capture.sequences), states.shape[1]))
    np.add.at(sums, capture.row_seq[own].numpy(), states[own].numpy())
    return sums / (capture.lengths.numpy() - 1)[:, None]


@whole_numbers(StudyError)
def folds(
    label: Bool[np.ndarray, " sequences"], groups: Int[np.ndarray, " sequences"], n_splits: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits that keep a group (a pair of canaries, an author's work) on one side.

    Raises:
        StudyError: fewer groups with, or without, the label than splits: some split would fit on one class.
    """
    fewest = min(len(np.unique(groups[label])), len(np.unique(groups[~label])))
    if fewest < n_splits:
        raise StudyError(
            f"expected at least {n_splits} texts with and without the label, in as many groups, got {fewest}. Add texts."
        )
    made = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed).split(label, label, groups)
    return [(fitted, held) for fitted, held in made]


def linear_probe(
    states: Float[np.ndarray, "sequences d"], label: Bool[np.ndarray, " sequences"], parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, " sequences"]:
    """Log-odds of the label by ridge logistic regression on standardized mean states, for sequences that were not fitted."""
    answer = np.full(len(label), np.nan)
    for fitted, held in parts:
        # Far more dimensions than texts: a strong ridge, as few texts can carry little else.
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        answer[held] = probe.fit(states[fitted], label[fitted]).decision_function(states[held])
    return answer


def nearest_memorized(
    states: Float[np.ndarray, "sequences d"], label: Bool[np.ndarray, " sequences"], parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, " sequences"]:
    """Minus the distance of a sequence's mean state to the nearest known memorized one, in state units.

    Known are those of the fitted folds.
    """
    answer = np.full(len(label), np.nan)
    for fitted, held in parts:
        known = states[fitted][label[fitted]]
        answer[held] = -np.linalg.norm(states[held][:, None] - known[None], axis=2).min(1)
    return answer


def blind_classifier(
    texts: Sequence[str], label: Bool[np.ndarray, " sequences"], parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, " sequences"]:
    """Log-odds of the label from the text alone (words and pairs of words, logistic regression), for texts that were not fitted.

    No model is asked. Where it can tell the classes, they differ as texts, and so can anything else that reads them.

    Source: Das et al. 2024, "Blind baselines beat membership inference attacks for foundation models".
    """
    answer = np.full(len(label), np.nan)
    for fitted, held in parts:
        reader = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True), LogisticRegression(max_iter=1000)
        )
        reader.fit([texts[i] for i in fitted], label[fitted])
        answer[held] = reader.decision_function([texts[i] for i in held])
    return answer


def _one_layer(table: pd.DataFrame) -> pd.DataFrame:
    tables.require(table, "passage", "doc", "seq", "pos", "surprisal")
    return table if "layer" not in table else table[table["layer"] == table["layer"].iloc[0]]


def _parts(rows: pd.DataFrame, answer: pd.DataFrame, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Which characters of its passage each sequence of the answer holds: `[start, end)`."""
    if not {"start", "end"} <= set(rows):
        rows = rows.assign(start=-1, end=-1)
    known = rows[rows["start"] >= 0].groupby("seq")[["start", "end"]].agg({"start": "min", "end": "max"})
    found = known.reindex(answer["seq"])
    unknown = found["start"].isna().to_numpy()
    cut = answer["passage"].duplicated(keep=False).to_numpy()
    if (unknown & cut).any():
        passage = answer["passage"][unknown & cut].iloc[0]
        raise TableError(
            f"expected start and end of the tokens of passage {passage}, which is several sequences, got none: what of its text is "
            "in which is not known. Keep those columns, or analyze with a max_length that holds whole texts."
        )
    whole = [(0, len(texts[passage])) for passage in answer["passage"]]
    held = zip(found["start"], found["end"], whole, unknown, strict=True)
    return [all_of_it if lost else (int(start), int(end)) for start, end, all_of_it, lost in held]


def _lowercase_mean(
    lowercase: pd.DataFrame, answer: pd.DataFrame, texts: Sequence[str], parts: Sequence[tuple[int, int]]
) -> pd.Series:
    """Mean surprisal of the text in lower case: of a passage in several sequences, of the sequence's own characters."""
    cut = answer["passage"].duplicated(keep=False)
    if not cut.any():
        return _mean_of(lowercase, answer, "passage", "lower case")
    tables.require(lowercase, "start")
    _mean_of(lowercase, answer, "passage", "lower case")  # refuses other texts
    rows, made = _one_layer(lowercase), []
    for passage, (start, end) in zip(answer["passage"], parts, strict=True):
        if len(texts[passage].lower()) != len(texts[passage]):
            raise TableError(
                f"expected a text as long in lower case, got passage {passage}, whose characters move: what of it is in which "
                "sequence is not known. Analyze with a max_length that holds whole texts."
            )
        own = rows[(rows["passage"] == passage) & (rows["start"] >= start) & (rows["start"] < end)]
        made.append(own["surprisal"].mean())
    return pd.Series(made, index=answer.index)


def _labels(rows: pd.DataFrame) -> list[str]:
    known = {*tables.KEYS, "span", "surprisal", "agreement", "standardized_likelihood", *tables.columns(rows)}
    return [name for name in rows.columns if name not in known]


def _mean_of(other: pd.DataFrame, answer: pd.DataFrame, key: str, whose: str) -> pd.Series:
    """Mean surprisal by `key`, in the order of the answer."""
    found = _one_layer(other).groupby(key)["surprisal"].mean()
    missing = set(answer[key]) - set(found.index)
    if missing:
        raise TableError(f"expected the same texts read by {whose}, got none for {key} {min(missing)}. Analyze the same list.")
    return found.loc[answer[key]].set_axis(answer.index)
