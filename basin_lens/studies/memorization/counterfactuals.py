"""The memorized path left on purpose: another continuation, a damaged prefix, a text memorized in part."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from basin_lens import memorize, stats
from basin_lens.analyzers import Agreement, Surprisal
from basin_lens.capture import Capture
from basin_lens.model import HookedModel, continuations, needed_tokenizer
from basin_lens.studies.framework.attempts import attempt, attempt_each
from basin_lens.studies.memorization.experiment import Planted, tensor_of
from basin_lens.studies.memorization.scores import CHANGES, SCORES, measure_texts, with_changes
from basin_lens.texts import Passage

EDITS = (0, 1, 2, 4, 8, 16)
_CANDIDATES = 4


@dataclass(frozen=True)
class Forked:
    """What came of it.

    `forks`: tests of true against other continuation by layer, tuned model and change from the base. `likely`: how likely the base
    model found either. `path`: one row per (prefix, edits): share recited, surprisal and agreement of the true continuation,
    scores by layer. `widths`: edits at which a prefix is left. `where`: memorized against other tokens of the same text,
    tuned less base, by layer and score. `spliced`: the table behind it.
    """

    forks: pd.DataFrame
    likely: pd.DataFrame
    path: pd.DataFrame
    widths: pd.DataFrame
    where: pd.DataFrame
    spliced: pd.DataFrame


def fork(planted: Planted, *, progress: bool = True) -> Forked:
    """Fork, damage and splice the members that were shown most."""
    plan, texts = planted.plan, planted.texts
    members = texts[texts["member"]].sort_values(["dose", "seq"], ascending=[False, True])[: plan.forks]
    chosen = members["seq"].tolist()
    tokens = tensor_of(planted, chosen)
    first = tokens.shape[1] - plan.length + plan.prompt
    kinds = [str(planted.passages[seq].labels["kind"]) for seq in chosen]
    likely, forks = _continuations(planted, tokens, first, kinds, progress)
    path, widths = _damaged(planted, tokens, first, members, progress)
    where, spliced = _spliced(planted, chosen, progress)
    return Forked(forks, likely, path, widths, where, spliced)


def _continuations(
    planted: Planted, tokens: torch.Tensor, first: int, kinds: list[str], progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Behind the same prefix, the true continuation and one that the base model finds as likely."""
    plan = planted.plan
    tokenizer = needed_tokenizer(planted.base)
    length = tokens.shape[1] - first
    # The base model's own continuations are as fluent as it can be; where it is not, other texts of the kind are as unlikely as the
    # true one.
    repeated = tokens[:, :first].repeat_interleave(_CANDIDATES, 0)
    sampled = continuations(planted.base, repeated, length, temperature=1.0, seed=plan.seed).tolist()
    held_out = [p.text for p in planted.passages if not p.labels["member"]]
    candidates = []
    for place, kind in enumerate(kinds):
        known = kind in memorize.KINDS
        fresh = (
            memorize.fresh_texts(planted.base, kind, _CANDIDATES, plan.length, seed=plan.seed + 7919 * (place + 1))
            if known
            else held_out
        )
        tails = [memorize.ids_of(tokenizer, text)[-length:] for text in fresh[:_CANDIDATES]]
        candidates.append([*sampled[place * _CANDIDATES : (place + 1) * _CANDIDATES], *tails])
    others, losses = memorize.alternatives(planted.base, tokens, first, candidates)
    both = torch.cat([tokens, others])
    measured = {}
    for name, model in (("base", planted.base), ("tuned", planted.tuned)):
        measured[name] = _continuation_scores(model, both, first, planted, planted.banks[name], progress)
    table = measured["tuned"]
    for name in SCORES:
        table[f"{name}_change"] = table[name] - measured["base"][name]
    count = len(tokens)
    table["doc"] = [f"prefix-{seq % count}" for seq in table["seq"]]
    table["true"] = table["seq"] < count
    columns = [*SCORES, *CHANGES]
    means = table.groupby(["layer", "doc", "true"])[columns].mean().unstack("true")
    told = table[table["layer"] == planted.layers[0]].groupby(["doc", "true"])["surprisal"].mean().unstack("true")
    apart = pd.DataFrame({name: means[name][True] - means[name][False] for name in columns}).reset_index()
    apart["seq"] = apart["doc"]
    found = attempt(stats.before_after, apart, columns, correction="max-t", seed=plan.seed, unit="document")
    likely = pd.DataFrame(
        {
            "doc": [f"prefix-{i}" for i in range(count)],
            "kind": kinds,
            "true_loss": losses[:, 0],
            "other_loss": losses[:, 1],
        }
    )
    told = told.rename(columns={True: "true_loss_tuned", False: "other_loss_tuned"}).reset_index()
    likely = likely.merge(told, on="doc", validate="one_to_one")
    return likely, found


def _continuation_scores(
    model: HookedModel, tokens: torch.Tensor, first: int, planted: Planted, bank: Capture, progress: bool
) -> pd.DataFrame:
    """Scores of the tokens from `first` on."""
    plan = planted.plan
    # All of them are real: a text may end in the token that the tokenizer pads with.
    real = torch.ones_like(tokens)
    capture = Capture.from_texts(model, tokens, attention_mask=real, layers=planted.layers, progress=False)
    own = [Surprisal(), Agreement()]
    table = measure_texts(
        model, capture, own, k=plan.k, layers=planted.layers, bank=bank, seed=plan.seed, progress=progress, first=first
    )
    return table[table["pos"] >= first].reset_index(drop=True)


def _damaged(
    planted: Planted, tokens: torch.Tensor, first: int, members: pd.DataFrame, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prefixes with more and more tokens replaced, and whether the model still finds its way back."""
    plan = planted.plan
    pool = sorted({token for row in tensor_of(planted, range(len(planted.passages))).tolist() for token in row[-plan.length :]})
    head = tokens.shape[1] - plan.length
    edits = [count for count in EDITS if count <= first - head]
    versions = [memorize.substituted(tokens, first, count, pool, keep=head, seed=plan.seed) for count in edits]
    shares = memorize.recited(planted.tuned, torch.cat(versions), first).reshape(len(edits), len(tokens))
    table = _continuation_scores(planted.tuned, torch.cat(versions), first, planted, planted.banks["tuned"], progress)
    count = len(tokens)
    table["edits"] = np.array(edits)[table["seq"].to_numpy() // count]
    table["member"] = table["seq"].to_numpy() % count
    path = table.groupby(["layer", "edits", "member"])[[*SCORES, "surprisal", "agreement"]].mean().reset_index()
    path["recited"] = shares[[edits.index(e) for e in path["edits"]], path["member"].to_numpy()]
    path["doc"] = [f"prefix-{m}" for m in path.pop("member")]
    path["seq"] = path["doc"] + "/" + path["edits"].astype(str)
    widths = pd.DataFrame(
        {
            "doc": [f"prefix-{i}" for i in range(count)],
            "kind": [planted.passages[s].labels["kind"] for s in members["seq"]],
            "dose": members["dose"].to_numpy(),
            "recited_undamaged": shares[0],
            "width": memorize.width(edits, shares),
        }
    )
    return path, widths


def _spliced(planted: Planted, chosen: list[int], progress: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts of which only the middle was memorized, between thirds of held-out texts of its kind: does the score say where?

    The base model reads the same texts, so that what the parts are without any training is taken out.
    """
    plan = planted.plan
    made = []
    for place, seq in enumerate(chosen):
        own = planted.passages[seq]
        unseen = [p.text for p in planted.passages if not p.labels["member"] and p.labels["kind"] == own.labels["kind"]]
        head, tail = (text[: len(text) // 3] for text in (unseen[(2 * place + i) % len(unseen)] for i in (0, 1)))
        span = (len(head) + 1, len(head) + 1 + len(own.text))
        made.append(Passage(f"{head} {own.text} {tail}", doc=f"spliced-{place}", spans={"memorized": span}))
    scores = [*SCORES, "surprisal", "agreement"]
    before, after = (
        measure_texts(
            model,
            Capture.plan(model, made, layers=planted.layers, max_length=2 * (plan.length + 1)),
            [Surprisal(), Agreement()],
            k=plan.k,
            layers=planted.layers,
            bank=planted.banks[name],
            seed=plan.seed,
            progress=progress,
            by=("seq", "span"),  # as many of what was memorized as of the rest
        )
        for name, model in (("base", planted.base), ("tuned", planted.tuned))
    )
    table = with_changes(before, after, scores)
    table["part"] = np.where(table["span"] == "memorized", "memorized", "not")
    changes = [f"{name}_change" for name in scores]
    found = attempt_each(
        stats.compare_groups,
        table,
        changes,
        "part",
        groups=("memorized", "not"),
        paired=True,
        n_resamples=1999,
        seed=plan.seed,
        unit="document",
    )
    return stats.correct(found, "bh"), table
