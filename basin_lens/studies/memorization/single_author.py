"""The original guide's own design: passages of one author trained on, others of the same author, and unrelated text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from basin_lens import memorize, stats
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.model import HookedModel
from basin_lens.studies.framework.attempts import attempt
from basin_lens.studies.memorization.experiment import FEWEST_PER_CLASS, Plan, Planted, refuse_built_in
from basin_lens.studies.memorization.scores import CHANGES, SCORES, measure_texts, with_changes
from basin_lens.texts import Passage
from basin_lens.texts.copies import copied_passages, passage_groups


def author_passages(model: HookedModel, texts: Sequence[Passage], plan: Plan) -> list[Passage]:
    """Passages of one author's works, in pairs of neighbors, of each of which a coin decides which one is trained on.

    A passage that is a copy of an earlier one, as of a work given twice, is left out: a coin could train on one and hold the other
    out.

    Raises:
        StudyError: fewer passages than the plan's pairs need. TextError: none long enough.
    """
    refuse_built_in(texts, model)
    # Pairs are neighbors in one work.
    pairs: list[tuple[str, list[str]]] = []
    works, copied = _cuts(model, texts, plan.length)
    for doc, cuts in works:
        pairs += [(doc, cuts[at : at + 2]) for at in range(0, len(cuts) - 1, 2)]
    wanted = plan.per_dose * len(plan.doses)
    if len(pairs) < wanted:
        raise StudyError(
            f"expected at least {wanted} pairs of passages of {plan.length} tokens by the author ({plan.per_dose} for each of "
            f"{len(plan.doses)} doses), got {len(pairs)}{f' without {copied} copies of others' if copied else ''}. Give more "
            "text, or plan fewer."
        )
    rng = np.random.default_rng(plan.seed)
    chosen = np.sort(rng.permutation(len(pairs))[:wanted])
    passages: list[Passage] = []
    for pair, place in enumerate(chosen.tolist()):
        doc, both = pairs[place]
        dose = plan.doses[pair % len(plan.doses)]
        coin = bool(rng.integers(2))
        for member, text in zip((coin, not coin), both, strict=True):
            labels = {"member": member, "dose": int(dose), "kind": "author", "pair": pair, "work": doc}
            passages.append(Passage(text, doc=f"passage-{len(passages)}", labels=labels))
    return passages


def unrelated_passages(model: HookedModel, texts: Sequence[Passage], plan: Plan, works: Sequence[Passage] = ()) -> list[Passage]:
    """Passages by others, at most as many as are to be planted and held out; copies of one another, and of the works, left out.

    Raises:
        StudyError: too few, or built-in texts.
    """
    refuse_built_in(texts, model)
    cuts, copied = _others_cuts(model, texts, plan.length, works)
    if len(cuts) < FEWEST_PER_CLASS:
        raise StudyError(
            f"expected unrelated texts of at least {FEWEST_PER_CLASS} passages of {plan.length} tokens, got {len(cuts)}"
            f"{f' without {copied} copies of one another or of the works' if copied else ''}. Give more."
        )
    return [Passage(text, doc=f"unrelated-{i}") for i, text in enumerate(cuts[: 2 * plan.per_dose * len(plan.doses)])]


def copies_said(model: HookedModel, texts: Sequence[Passage], unrelated: Sequence[Passage], plan: Plan) -> list[str]:
    """How many passages the two functions above leave out as copies."""
    own = _cuts(model, texts, plan.length)[1]
    others = _others_cuts(model, unrelated, plan.length, texts)[1]
    said = [f"{own} passages of the works are copies of others, nearly or in full, and left out."] if own else []
    return said + ([f"{others} unrelated passages are copies of one another or of the works, and left out."] if others else [])


def _cuts(model: HookedModel, texts: Sequence[Passage], length: int) -> tuple[list[tuple[str, list[str]]], int]:
    """Passages of each work that are no copies of earlier ones, and how many others there were."""
    works = [
        (str(s.doc) if s.doc is not None else f"work-{n}", memorize.pieces(model, s.text, length)) for n, s in enumerate(texts)
    ]
    every = [Passage(text) for _, cuts in works for text in cuts]
    copied = {index for group in passage_groups(model, every) for index in group[1:]}
    kept, at = [], 0
    for doc, cuts in works:
        kept.append((doc, [text for index, text in enumerate(cuts, at) if index not in copied]))
        at += len(cuts)
    return kept, len(copied)


def _others_cuts(model: HookedModel, texts: Sequence[Passage], length: int, works: Sequence[Passage]) -> tuple[list[str], int]:
    """The same of texts by others, without copies of the works either."""
    held, repeated = _cuts(model, texts, length)
    cuts = [text for _, found in held for text in found]
    copied = set(copied_passages(model, [Passage(text) for text in cuts], works))
    return [text for index, text in enumerate(cuts) if index not in copied], repeated + len(copied)


def guide_contrast(planted: Planted, made: Sequence[Passage], progress: bool) -> pd.DataFrame:
    """The original guide's contrast: trained on against unrelated text, beside trained on against the same author's."""
    plan = planted.plan
    before, after = (
        measure_texts(
            model,
            Capture.plan(model, list(made), layers=planted.layers, max_length=plan.length + 1),
            k=plan.k,
            bank=planted.banks[name],
            layers=planted.layers,
            seed=plan.seed,
            progress=progress,
        )
        for name, model in (("base", planted.base), ("tuned", planted.tuned))
    )
    scores = [*SCORES, *CHANGES]
    apart = with_changes(before, after, SCORES).groupby(["layer", "doc", "seq"])[scores].mean().reset_index()
    own = planted.sequences[["layer", "doc", "seq", "member", *scores]]
    own = own.assign(group=np.where(own["member"], "trained", "same author"))
    rows = pd.concat([own, apart.assign(group="unrelated", seq=apart["seq"] + 1_000_000)], ignore_index=True)
    parts = []
    for other in ("same author", "unrelated"):
        found = attempt(
            stats.compare_groups,
            rows,
            scores,
            "group",
            groups=("trained", other),
            correction="none",
            n_resamples=1999,
            seed=plan.seed,
            unit="document",
        )
        parts.append(found.assign(contrast=f"trained - {other}"))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")
