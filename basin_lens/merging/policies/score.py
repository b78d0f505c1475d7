"""Tokens that a score of the caller's chooses."""

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Score(Rule):
    """For studies that ask which tokens can be merged; no comparison has scores to give."""

    name = "score"
    description = "the most similar cluster, if the token's score is above the level"
    fixed = True
    takes_rows = True
    scored = True

    def join(self, offer: Offer) -> Choice:
        return Choice(int(offer.similarity().argmax()), bool(offer.score > offer.level))


SCORE = Policy("score", "tokens that a score of the caller's chooses", rule=Score(), compared=False)
