"""What the study of mergeability says and shows."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.studies.framework.declared_tests import ALPHA
from basin_lens.studies.framework.display_columns import shown
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.studies.framework.table_parts import Row, above_layer_0, named_rows
from basin_lens.studies.mergeability.forced_merges import LATER, Costs, Setting
from basin_lens.views import Section, forest, layer_curve, quartile_bars, result_curve, scatter, token_view

COST, CHANGE, SIMILARITY, EXCESS = "merge_cost", "merge_change", "merge_similarity", "merge_excess"
# Geometry first, then what might explain the cost as well.
SCORES = (HEADLINE, "radius", SIMILARITY, "state_norm", "surprisal", "log_frequency")
BASELINE = "random choice"  # of it, the policies that go by a score differ in nothing but which tokens are merged
_MEANING = {
    "cosine": "the most similar ones: a token joins its most similar earlier cluster if the cosine reaches a level",
    "low surprisal": "those that the plain model found easiest to predict; each joins its most similar earlier cluster",
    "high compression": "those of the highest compression, less that of random sets, in this layer; each joins its most similar "
    "earlier cluster",
    "random choice": "any; each joins its most similar earlier cluster: differs from the three above only in which tokens",
    "random": "any; each joins any earlier cluster",
}

HYPOTHESIS = (
    "Declared before looking: among the tokens of one text, compression (less that of random sets) goes with the cost of merging "
    "the token (either direction), at fixed token frequency, position, norm, neighborhood radius, share of equal tokens and "
    "surprisal; and it still does at fixed cosine with the token that it is merged into. The cost is the rise of the summed loss "
    "of all later tokens when only this token is merged, in only this layer. Each is tested at the layer (not 0) chosen on half "
    "of the documents, on the other half. And: when the largest share of tokens is merged in all layers measured, taking those of "
    "highest compression costs less loss than taking any (one-sided), on documents that did not set the levels. One family "
    "(Holm)."
)

NOT_TESTED = (
    "What a streaming system could do: surprisal comes from a pass without merging, and compression from neighbors in other "
    "texts and from the block's own output. Neither is there when the token has to be merged.",
    "Single tokens merged in several layers at once, into another token than the most similar one, or after training.",
    f"Another window than {{window}} tokens; tokens of which fewer than {LATER} later losses could have felt the merge.",
    "Whether the geometry is the cause: nothing here changes a token's geometry.",
    "Layers other than {layers}; other k, metrics and contexts of the score (study robustness).",
)


def sections_of(
    whole: pd.DataFrame, drawn: pd.DataFrame, found: pd.DataFrame, quartiles: pd.DataFrame, policies: pd.DataFrame, layer: int
) -> tuple[list[Section], dict[str, Figure]]:
    """The report's sections, and figures by file name."""
    standard, mine = found[found["control_set"] == "standard"], found[found["score"] == HEADLINE]
    policies = policies.assign(budget=[f"{share:.0%} merged" for share in policies["share"]])
    policies = tables.with_provenance(policies, whole)
    alone, differences = policies[policies["versus"].isna()], policies[policies["versus"].notna()]
    figures = {
        "cost-by-layer": layer_curve(drawn, COST),
        "correlation-by-layer": result_curve(above_layer_0(mine[mine["against"] == COST]), by="control_set"),
        "rivals-by-layer": result_curve(above_layer_0(standard[standard["against"] == COST]), by="score"),
        "change-by-layer": result_curve(above_layer_0(standard[standard["against"] == CHANGE]), by="score"),
        "quartiles": quartile_bars(quartiles),
        "scatter": scatter(drawn, HEADLINE, COST, layer, y_scale="rank"),
        "policies": forest(alone, ["budget", "policy"]),
        "policies-against-random": forest(differences, ["budget", "policy"], by="versus"),
    }
    return [
        *_layer_sections(drawn, found, figures),
        *_token_sections(figures, layer),
        *_policy_sections(alone, differences, figures),
        Section(
            "One text",
            f"The first sequence at layer {layer}; only some tokens were merged.",
            view=token_view(whole, [COST, HEADLINE, "surprisal"], layer, seq=int(drawn["seq"].min())),
        ),
    ], figures


def _layer_sections(drawn: pd.DataFrame, found: pd.DataFrame, figures: Mapping[str, Figure]) -> list[Section]:
    """The cost, and what goes with it, layer by layer."""
    return [
        Section(
            "What it costs to merge one token",
            "Mean over documents of the rise of the summed loss of all later tokens, in nats, when one token alone is merged in "
            "one layer alone.",
            figure=figures["cost-by-layer"],
            caption="Mean with its 95 % interval over documents.",
            table=_costs_by_layer(drawn),
            note="Means over documents: merge_change, merge_similarity, leader_is_same_token (share of merges into an equal "
            "token).",
        ),
        Section(
            "Compression against the cost, layer by layer",
            "Correlation within sequences, at fixed frequency, position, norm, radius, share of equal tokens and surprisal; and "
            "at fixed cosine with the leader too. Above 0: tokens whose neighbors the block draws together at home, more than "
            "elsewhere, cost more.",
            figure=figures["correlation-by-layer"],
            caption="Mean partial Spearman correlation within sequences, 95 % interval over documents (layer 0 in the table); "
            "filled: p at most 0.05 after Benjamini-Hochberg over scores, layers and both sets of controls.",
            table=shown(found, "layer", "score", "against", "control_set", "n_documents"),
        ),
        Section(
            "And its rivals",
            "The same for every score, each at fixed other controls. merge_similarity is the cosine with the leader: what a "
            "merger goes by without any study.",
            figure=figures["rivals-by-layer"],
            caption="As above; all numbers are in the table above.",
        ),
        Section(
            "How much a merge changes, for better or worse",
            "Exploration, nothing of it declared. One token changes little, and the words that happen to follow decide whether "
            "that raises or lowers their loss. merge_change is the change itself: the divergence KL(plain || with the merge), "
            "summed over all later predictions, in nats, never below 0.",
            figure=figures["change-by-layer"],
            caption="Mean partial Spearman correlation of each score with merge_change, standard controls, a family of its own; "
            "all numbers are in the table above.",
        ),
    ]


def _token_sections(figures: Mapping[str, Figure], layer: int) -> list[Section]:
    """The cost token by token, in one layer."""
    return [
        Section(
            f"The cost in the quarters of a score, layer {layer}",
            "No control is applied here.",
            figure=figures["quartiles"],
            caption="Mean cost over documents with 95 % intervals; above each panel, the highest quarter less the lowest.",
        ),
        Section(
            f"Compression and cost, token by token, layer {layer}",
            figure=figures["scatter"],
            caption="Compression less its sequence's mean, ranks of the cost within sequences; line by least squares, band from "
            "a bootstrap of documents.",
        ),
    ]


def _policy_sections(alone: pd.DataFrame, differences: pd.DataFrame, figures: Mapping[str, Figure]) -> list[Section]:
    """Many tokens merged at once."""
    return [
        Section(
            "Many tokens at once: excess loss of each policy",
            [
                *(f"{name}: {words}." for name, words in _MEANING.items()),
                "Surprisal is taken from a plain pass, and compression looks at neighbors in other texts and at the block's "
                "output: a model that merges as it reads has neither.",
                "Levels come from other documents, so the share that is really merged differs a little: merged_share.",
            ],
            figure=figures["policies"],
            caption="Mean loss with merging less without, nats per token, on documents that did not set the levels; 95 % "
            "bootstrap interval over documents.",
            table=_told(alone),
        ),
        Section(
            "Each policy less the random ones",
            "The same sequences, paired. Below 0: better than chance. Against random choice, only the choice of the tokens "
            "differs.",
            figure=figures["policies-against-random"],
            caption="Mean difference of the excess loss, nats per token; 95 % bootstrap interval over documents; p by sign "
            "flips of whole documents.",
            table=_told(differences),
        ),
    ]


def _told(policies: pd.DataFrame) -> pd.DataFrame:
    names = [
        "policy",
        "share",
        "versus",
        "merged_share",
        "estimate",
        "low",
        "high",
        "p",
        "p_corrected",
        "n_units",
        "n_sequences",
        "note",
    ]
    return policies[[name for name in names if not policies[name].isna().all()]]


def about_merges(drawn: pd.DataFrame, setting: Setting, costs: Costs, losses: pd.DataFrame) -> list[str]:
    """What was merged, in sentences."""
    left, count = len(setting.capture.sequences) - drawn["seq"].nunique(), len(setting.capture.sequences)
    short = f" {left} of {count} sequences had too few tokens that can be merged." if left else ""
    return [
        f"{len(drawn):,} forced merges: {len(drawn) // drawn['layer'].nunique():,} tokens of {drawn['seq'].nunique()} sequences, "
        f"each alone in each layer alone, into its most similar earlier token, read by queries {setting.window} or more tokens "
        f"behind. Merging nothing instead changes no single loss by more than {costs.rounding:.1g} nats (rounding).{short}",
        "The scores of layer n are those of the state that enters block n: the same state is compared when layer n merges. "
        f"States are centered by the mean over {len(setting.calibration)} sequences.",
        f"Policies are tested on {losses['seq'].nunique()} sequences; {len(setting.calibration)} of other documents set their "
        "levels.",
    ]


def remarks_of(found: pd.DataFrame, drawn: pd.DataFrame, policies: pd.DataFrame) -> list[str]:
    """What came out besides the declared tests, in words."""
    told = [
        f"Merging one token in one layer costs {drawn[COST].mean():+.4f} nats on average (median {drawn[COST].median():+.4f}), "
        f"summed over all later tokens; {drawn[COST].lt(0).mean():.0%} of the merges lower the loss.",
    ]
    for against, words in ((COST, "the cost"), (CHANGE, "how much a merge changes later predictions, for better or worse")):
        told.append(f"Exploration, {words}: {_explored(above_layer_0(found[found['against'] == against]))}")
    for share, rows in policies[policies["versus"] == BASELINE].groupby("share"):
        compared = "; ".join(map(_compared, named_rows(rows)))
        told.append(
            f"At {float(str(share)):.0%} of the tokens that can be merged, excess loss less that of random choice: {compared}."
        )
    return told


def _explored(found: pd.DataFrame) -> str:
    """Which scores stay, with the standard controls; and the range of compression, with both sets."""
    told = []
    for score in SCORES:
        rows = found[(found["score"] == score) & (found["control_set"] == "standard") & (found["p_corrected"] <= ALPHA)]
        if len(rows):
            told.append(f"{score} ({', '.join(f'{row.estimate:+.2f} at layer {row.layer}' for row in named_rows(rows))})")
    mine = found[found["score"] == HEADLINE]["estimate"]
    stay = f"there stay {'; '.join(told)}" if told else "nothing stays"
    return (
        f"of the partial correlations of {len(SCORES)} scores at {found['layer'].nunique()} layers, {stay} below 0.05 after "
        f"correction; compression's run from {mine.min():+.2f} to {mine.max():+.2f}."
    )


def _costs_by_layer(drawn: pd.DataFrame) -> pd.DataFrame:
    """What single merges did, as a table."""
    summary = tables.layer_summary(drawn, [COST, CHANGE, SIMILARITY, "leader_is_same_token"])
    by_layer = drawn.groupby("layer")[COST]
    names = {f"{name}_mean": name for name in (CHANGE, SIMILARITY, "leader_is_same_token")}
    shown_too = ["layer", "n_documents", "n_tokens", f"{COST}_mean", f"{COST}_low", f"{COST}_high", *names]
    return (
        summary[shown_too]
        .rename(columns=names)
        .assign(cost_median=by_layer.median().to_numpy(), share_below_0=by_layer.apply(lambda costs: costs.lt(0).mean()).to_numpy())
    )


def _compared(row: Row) -> str:
    reading = "not told apart" if not row.p_corrected <= ALPHA else "less" if row.estimate < 0 else "more"
    interval = f"({row.low:+.4f} to {row.high:+.4f})"
    return f"{row.policy} ({row.merged_share:.0%} merged) {row.estimate:+.4f} nats/token {interval}: {reading}"
