"""The most similar cluster."""

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Cosine(Rule):
    """Online leader clustering (Hartigan 1975)."""

    name = "cosine"
    description = "the most similar cluster, if the similarity reaches the level"
    fixed = True
    takes_rows = True
    learned = True

    def join(self, offer: Offer) -> Choice:
        similarity = offer.similarity()
        best = int(similarity.argmax())
        return Choice(best, bool(similarity[best] >= offer.level))


# The first of the untrained ones: without a trained merger, what it leaves on the texts is what blind policies are given.
COSINE = Policy("cosine", "the same without training: principal directions, thresholds by calibration", rule=Cosine(), turn=1)
