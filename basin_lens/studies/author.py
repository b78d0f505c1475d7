"""The original guide's own design: passages of one author trained on, others of the same author, and unrelated text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from basin_lens import memorize, stats
from basin_lens.analysis import analyze
from basin_lens.analyzers import Compression
from basin_lens.errors import StudyError
from basin_lens.studies import base
from basin_lens.studies.planted import FEWEST_PER_CLASS, Plan, Planted, refuse_built_in, with_changes
from basin_lens.texts import Passage


def author_passages(model: Any, texts: Sequence[Passage], plan: Plan) -> list[Passage]:
    """Passages of one author's works, in pairs of neighbors, of each of which a coin decides which one is trained on.

    Raises:
        StudyError: fewer passages than the plan's pairs need. TextError: none long enough.
    """
    refuse_built_in(texts)
    # Pairs are neighbors in one work.
    pairs: list[tuple[str, list[str]]] = []
    for number, source in enumerate(texts):
        doc = str(source.doc) if source.doc is not None else f"work-{number}"
        cuts = memorize.pieces(model, source.text, plan.length)
        pairs += [(doc, cuts[at : at + 2]) for at in range(0, len(cuts) - 1, 2)]
    wanted = plan.per_dose * len(plan.doses)
    if len(pairs) < wanted:
        raise StudyError(
            f"expected at least {wanted} pairs of passages of {plan.length} tokens by the author ({plan.per_dose} for each of {len(plan.doses)} "
            f"doses), got {len(pairs)}. Give more text, or plan fewer."
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


def unrelated_passages(model: Any, texts: Sequence[Passage], plan: Plan) -> list[Passage]:
    """Passages by others, as many as are to be planted and held out at most.

    Raises:
        StudyError: too few, or built-in texts.
    """
    refuse_built_in(texts)
    cuts = [text for source in texts for text in memorize.pieces(model, source.text, plan.length)]
    if len(cuts) < FEWEST_PER_CLASS:
        raise StudyError(
            f"expected unrelated texts of at least {FEWEST_PER_CLASS} passages of {plan.length} tokens, got {len(cuts)}. Give more."
        )
    return [Passage(text, doc=f"unrelated-{i}") for i, text in enumerate(cuts[: 2 * plan.per_dose * len(plan.doses)])]


def guide_contrast(planted: Planted, made: Sequence[Passage], progress: bool) -> pd.DataFrame:
    """The original guide's contrast: trained on against unrelated text, beside trained on against the same author's."""
    plan = planted.plan
    analyzers = [Compression(k=plan.k)]
    options: dict[str, Any] = {"layers": planted.layers, "max_length": plan.length + 1, "seed": plan.seed, "progress": progress}
    before, after = (analyze(model, list(made), analyzers, bank=planted.banks[name], **options)
              for name, model in (("base", planted.base), ("tuned", planted.tuned)))  # fmt: skip
    apart = with_changes(before, after, ("compression",))
    apart = apart.groupby(["layer", "doc", "seq"])[["compression", "compression_change"]].mean().reset_index()
    own = planted.sequences[["layer", "doc", "seq", "member", "compression", "compression_change"]]
    own = own.assign(group=np.where(own["member"], "trained", "same author"))
    rows = pd.concat([own, apart.assign(group="unrelated", seq=apart["seq"] + 1_000_000)], ignore_index=True)
    parts = []
    for other in ("same author", "unrelated"):
        found = base.attempt(
            stats.compare_groups, rows, ["compression", "compression_change"], "group", groups=("trained", other), correction="none",
            n_resamples=1999, seed=plan.seed, unit="document",
        )  # fmt: skip
        parts.append(found.assign(contrast=f"trained - {other}"))
    return stats.correct(pd.concat(parts, ignore_index=True), "bh")
