"""What a gradient is taken of, and passes that a token analyzer makes on its own account."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.model import HookedModel, forward_pass, knocked_out, measuring, point_name
from basin_lens.values import Whole

TOKENS_PER_PASS = 1024

# "future_loss", "last_logit", or a token id (its logit). "cache" stands for the user's own backward pass and is never run.
Target = str | Whole


def token_losses(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch predicted"]:
    """-log p(token | those before it) of every token but the first, in nats."""
    # Rows of a matrix: with the vocabulary as the middle dimension, the softmax would take four times as long.
    rows, wanted = logits[:, :-1].float().flatten(0, 1), tokens[:, 1:]
    return torch.nn.functional.cross_entropy(rows, wanted.flatten(), reduction="none").view(wanted.shape)


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
        read: list[Tensor] = []
        with measuring(self.model):
            forward_pass(self.model, self.tokens, {point_name("resid_pre", layer): lambda t: read.append(t.float())})
        return read[0]

    def losses(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """-log p of each token given those before it; NaN at position 0, which nothing predicts. Padding means nothing."""
        losses = torch.full(self.tokens.shape, torch.nan, device=self.tokens.device)
        for index, row in enumerate(logits):  # a sequence at a time: the vocabulary is wide
            losses[index, 1:] = token_losses(row[None], self.tokens[index][None])[0]
        return losses

    def losses_without(self, rows: Int[Tensor, " copies"], columns: Int[Tensor, " copies"]) -> Float[Tensor, "copies pos"]:
        """The same with one column of each copy knocked out of the attention of later queries, in all blocks."""
        losses = torch.full((len(rows), self.tokens.shape[1]), torch.nan, device=self.tokens.device)
        with measuring(self.model):
            for part in self._parts(len(rows)):
                tokens = self.tokens[rows[part]]
                with knocked_out(self.model, columns[part], tokens.shape[1]):
                    losses[part, 1:] = token_losses(forward_pass(self.model, tokens, {}), tokens)
        return losses

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
                put = {point_name("resid_pre", layer): lambda t, leaf=leaf: leaf.view_as(t)}
                logits = forward_pass(self.model, self.tokens[rows[part]], put)
                wanted = target[rows[part]] if isinstance(target, Tensor) else target
                found = target_values(logits, self.tokens[rows[part]], self.valid[rows[part]], wanted)
                values[part], slopes[part] = found.detach(), torch.autograd.grad(found.sum(), leaf)[0].float()
        return values, slopes

    def _parts(self, copies: int) -> list[slice]:
        size = max(1, TOKENS_PER_PASS // self.tokens.shape[1])
        return [slice(start, start + size) for start in range(0, copies, size)]
