"""The cluster that was opened last."""

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Adjacent(Rule):
    """Only neighbors merge."""

    name = "adjacent"
    description = "the cluster that was opened last, if the similarity reaches the level"
    last_only = True
    fixed = True
    learned = True

    def join(self, offer: Offer) -> Choice:
        return Choice(offer.clusters - 1, bool(offer.similarity()[0] >= offer.level))


ADJACENT = Policy("adjacent", "only with the cluster opened last", rule=Adjacent())
