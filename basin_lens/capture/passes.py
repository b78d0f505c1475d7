"""What a gradient is taken of, and passes that a token analyzer makes on its own account."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.model import HookedModel, Prefixes, entering, forward_pass, knocked_out, measuring, pass_from
from basin_lens.model.shorter_passes import CANNOT
from basin_lens.values import Whole

TOKENS_PER_PASS = 1024
_NOTHING = -1  # no token id
# Nats, and as a share: as far apart may losses of one token be, summed in another order. Measured in float32: 2.3e-7 at most over
# the families of tests/families.py (mixtures of experts; 0 in the others), 0 on SmolLM2-135M.
_SAME = 1e-5

# "future_loss", "last_logit", or a token id (its logit). "cache" stands for the user's own backward pass and is never run.
Target = str | Whole


def token_losses(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch predicted"]:
    """-log p(token | those before it) of every token but the first, in nats."""
    # Rows of a matrix: with the vocabulary as the middle dimension, the softmax would take four times as long. Behind the last
    # token nothing is wanted; to cut its row out would copy all the others, and all their gradients.
    wanted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=_NOTHING)
    rows = logits.float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(rows, wanted.flatten(), ignore_index=_NOTHING, reduction="none")
    return losses.view(wanted.shape)[:, :-1]


def target_values(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    valid: Bool[Tensor, "batch pos"],
    target: Target | Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """One number per sequence.

    - `"future_loss"`: sum over its tokens of -log p(token | those before it), in nats. Its gradient at position i is that of the
      loss of the tokens after i, because a state cannot reach earlier predictions.
    - `"last_logit"`: the largest logit behind its last token: of the token that the model predicts.
    - a token id, or one for each sequence: the logit of that token behind its last token.
    """
    if isinstance(target, str) and target == "future_loss":
        return (token_losses(logits, tokens) * valid[:, 1:]).sum(1)
    last = logits[torch.arange(len(logits), device=logits.device), valid.sum(1) - 1].float()
    if isinstance(target, Tensor):
        return last.gather(1, target[:, None])[:, 0]
    return last.amax(-1) if target == "last_logit" else last[:, int(target)]


def future_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """The target `"future_loss"`, summed over the sequences."""
    return target_values(logits, tokens, valid, "future_loss").sum()


@dataclass(frozen=True)
class Passes:
    """Passes over one batch beyond the one that fills the other analyzers: for an analyzer that `needs` `"passes"`.

    Every pass takes copies of the batch's sequences, `rows` saying which, about 1,000 tokens at a time. `model`, `tokens` and
    `valid` are there for passes of another kind (`basin_lens.model.forward_pass`); nothing of this may be kept.
    """

    model: HookedModel
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]

    def states(self, layer: int) -> Float[Tensor, "batch pos d"]:
        """States that enter block `layer`, float32."""
        return entering(self.model, self.tokens, layer)

    def losses(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """-log p of each token given those before it; NaN at position 0, which nothing predicts. Padding means nothing."""
        losses = torch.full(self.tokens.shape, torch.nan, device=self.tokens.device)
        for index, row in enumerate(logits):  # a sequence at a time: the vocabulary is wide
            losses[index, 1:] = token_losses(row[None], self.tokens[index][None])[0]
        return losses

    def losses_without(self, rows: Int[Tensor, " copies"], columns: Int[Tensor, " copies"]) -> Float[Tensor, "copies pos"]:
        """The same with one column of each copy knocked out of the attention of later queries, in all blocks.

        What stands before the column is the same with and without it, so only the tokens from there on are computed, where the
        model takes the keys and values of the others. Proved for each batch on a whole pass over one copy; else all passes are
        whole.
        """
        losses = torch.full((len(rows), self.tokens.shape[1]), torch.nan, device=self.tokens.device)
        with measuring(self.model):
            short = Prefixes.can(self.model)
            present = rows.unique()
            for part in self._parts(len(present)):
                mine = torch.nonzero(torch.isin(rows, present[part])).squeeze(1)
                if not short or not self._from_columns(losses, mine, rows[mine], columns[mine]):
                    for some in self._parts(len(mine)):
                        at = mine[some]
                        losses[at, 1:] = self._whole_without(rows[at], columns[at])
        return losses

    def _whole_without(self, rows: Int[Tensor, " copies"], columns: Int[Tensor, " copies"]) -> Float[Tensor, "copies predicted"]:
        tokens = self.tokens[rows]
        with knocked_out(self.model, columns, tokens.shape[1]):
            return token_losses(forward_pass(self.model, tokens, {}), tokens)

    def _from_columns(
        self, losses: Float[Tensor, "all pos"], at: Int[Tensor, " n"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
    ) -> bool:
        """Put in the losses of these copies, computed from their columns on; False: the model does not allow that."""
        present, which = rows.unique(return_inverse=True)
        tokens = self.tokens[present]
        length, order = tokens.shape[1], columns.argsort(stable=True)
        # The first token has nothing before it, and a mask shows what hides by what the first of several queries may not see.
        begins = columns.clamp(1, max(1, length - 2)).tolist()
        one = order[:1]
        whole = self._whole_without(rows[one], columns[one])

        def computed(some: Tensor) -> Tensor:
            first = begins[int(some[0])]
            with knocked_out(self.model, columns[some], length, first):
                rest = token_losses(prefixes.go_on(which[some], first), tokens[which[some], first:])
            return torch.cat([plain[which[some], :first], rest], dim=1)

        try:
            prefixes = Prefixes(self.model, tokens)
            plain = token_losses(prefixes.logits, tokens)
            if not torch.allclose(computed(one), whole, rtol=_SAME, atol=_SAME):
                return False
        except CANNOT as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        while len(order):
            # Small passes: all of one begin where its first copy's column stands.
            size = max(1, TOKENS_PER_PASS // 2 // (length - begins[int(order[0])]))
            some, order = order[:size], order[size:]
            losses[at[some], 1:] = computed(some)
        return True

    def slopes(
        self,
        layer: int,
        rows: Int[Tensor, " copies"],
        states: Float[Tensor, "copies pos d"],
        target: Target | Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " copies"], Float[Tensor, "copies pos d"]]:
        """The target of each copy with `states` put before block `layer`, and its gradient with respect to them."""
        values, slopes = states.new_empty(len(rows)), torch.empty_like(states)
        dtype = next(self.model.parameters()).dtype
        with measuring(self.model, gradients=True):
            for part in self._parts(len(rows)):
                leaf = states[part].detach().to(dtype).requires_grad_()
                logits = pass_from(self.model, layer, self.tokens[rows[part]], leaf)
                wanted = target[rows[part]] if isinstance(target, Tensor) else target
                found = target_values(logits, self.tokens[rows[part]], self.valid[rows[part]], wanted)
                values[part], slopes[part] = found.detach(), torch.autograd.grad(found.sum(), leaf)[0].float()
        return values, slopes

    def _parts(self, copies: int) -> list[slice]:
        size = max(1, TOKENS_PER_PASS // self.tokens.shape[1])
        return [slice(start, start + size) for start in range(0, copies, size)]
