"""Merging policies, one file each. A new one is a file beside these, and a line in `POLICIES`."""

from basin_lens.errors import MergeError
from basin_lens.merging.policies.adjacent import ADJACENT
from basin_lens.merging.policies.bipartite import BIPARTITE
from basin_lens.merging.policies.contract import Budget, Choice, ContextRule, Decision, KeyRule, Offer, Policy, Rule
from basin_lens.merging.policies.cosine import COSINE
from basin_lens.merging.policies.drop import DROP
from basin_lens.merging.policies.key_norm import KEY_NORM
from basin_lens.merging.policies.mean import MEAN
from basin_lens.merging.policies.random import RANDOM
from basin_lens.merging.policies.recent import RECENT
from basin_lens.merging.policies.score import SCORE
from basin_lens.merging.policies.stride import STRIDE
from basin_lens.merging.policies.trained import TRAINED

# All there are, by name.
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        TRAINED,
        COSINE,
        MEAN,
        ADJACENT,
        RANDOM,
        STRIDE,
        RECENT,
        KEY_NORM,
        DROP,
        SCORE,
        BIPARTITE,
    )
}


def compared_policies() -> dict[str, Policy]:
    """Those that comparisons set side by side, by name."""
    return {name: policy for name, policy in POLICIES.items() if policy.compared}


def all_rules() -> dict[str, Decision]:
    """Every rule that a merger can have, by name: those of the policies."""
    return {policy.rule.name: policy.rule for policy in POLICIES.values()}


def rule_named(name: str) -> Decision:
    """The rule of that name.

    Raises:
        MergeError: there is none.
    """
    known = all_rules()
    if name not in known:
        raise MergeError(f"expected rule among {', '.join(known)}, got {name!r}.")
    return known[name]


# What each rule does, by the name that `TokenMerger(rule=...)` takes.
RULES: dict[str, str] = {name: rule.description for name, rule in all_rules().items()}

__all__ = [
    "POLICIES",
    "RULES",
    "Budget",
    "Choice",
    "ContextRule",
    "Decision",
    "KeyRule",
    "Offer",
    "Policy",
    "Rule",
    "all_rules",
    "compared_policies",
    "rule_named",
]
