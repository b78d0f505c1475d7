"""The first token and a recent window (StreamingLLM, Xiao et al. 2024)."""

from basin_lens.errors import MergeError
from basin_lens.merging.policies.contract import Budget, Choice, Offer, Policy, Rule


class All(Rule):
    """Every token that leaves the window goes."""

    name = "all"
    description = "every token that leaves the recent window (to be dropped: first tokens plus recent window)"
    compares = False
    drops = True
    has_level = False

    def decide(self, offer: Offer, /) -> Choice:
        return self.join(offer)  # without a cluster too

    def join(self, _offer: Offer, /) -> Choice:
        return Choice(-1, True)


class Recent(Policy):
    """Its window is a number of tokens, right for sequences of the budget's length."""

    def options_for(self, budget: Budget) -> dict[str, object]:
        whole = budget.n_layers * budget.length * budget.row_bytes
        left = budget.share * whole - (budget.n_layers - budget.n_merged) * budget.length * budget.row_bytes
        rows = int(left / budget.n_merged / (budget.row_bytes + 4))  # a row and its place
        if rows < 2:
            raise MergeError(
                f"expected a budget that leaves two rows in each merged layer, got {budget.share}. Ask for more, or merge in more "
                "layers."
            )
        return {"rule": self.rule.name, **self.options, "recent": min(budget.length, rows - 1)}


RECENT = Recent(
    "recent",
    "first token and a recent window, the rest dropped (StreamingLLM)",
    rule=All(),
    options={"drop": True},
    blind=True,
    turn=3,
)
