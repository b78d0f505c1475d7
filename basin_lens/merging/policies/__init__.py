"""Merging policies, one file each. A new one is a file beside these, and a line in `POLICIES`."""

from collections.abc import Iterator

from basin_lens.errors import MergeError
from basin_lens.merging.policies.adjacent import ADJACENT
from basin_lens.merging.policies.bipartite import Bipartite
from basin_lens.merging.policies.contract import Budget, Choice, Offer, Policy, Rule
from basin_lens.merging.policies.cosine import COSINE
from basin_lens.merging.policies.drop import DROP
from basin_lens.merging.policies.key_norm import KEY_NORM
from basin_lens.merging.policies.mean import MEAN
from basin_lens.merging.policies.random import RANDOM
from basin_lens.merging.policies.recent import RECENT
from basin_lens.merging.policies.score import Score
from basin_lens.merging.policies.stride import STRIDE
from basin_lens.merging.policies.trained import TRAINED

# What comparisons set side by side, by name.
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
    )
}
# Rules that need what no comparison in the streaming protocol gives: scores, or the whole context.
_OTHER_RULES = (Score(), Bipartite())


def all_rules() -> Iterator[Rule]:
    """Every rule that a merger can have: those of the policies, and those beside."""
    yield from (policy.rule for policy in POLICIES.values())
    yield from _OTHER_RULES


def rule_named(name: str) -> Rule:
    """The rule of that name.

    Raises:
        MergeError: there is none.
    """
    known = {rule.name: rule for rule in all_rules()}
    if name not in known:
        raise MergeError(f"expected rule among {', '.join(known)}, got {name!r}.")
    return known[name]


# What each rule does, by the name that `TokenMerger(rule=...)` takes.
RULES: dict[str, str] = {rule.name: rule.description for rule in all_rules()}

__all__ = ["POLICIES", "RULES", "Budget", "Choice", "Offer", "Policy", "Rule", "all_rules", "rule_named"]
