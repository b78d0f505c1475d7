"""Weights of a block that a measurement needs beside its states."""

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.errors import ModelError
from basin_lens.model.protocol import HookedModel


def output_weight(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d"]:
    """The output projection W_O of the attention in block `layer`, by head, so that head h adds `z[h] @ W_O[h]`; float32.

    Whatever the model does behind it (bias, post-norms as in Gemma 2, a residual multiplier as in Granite) is not in it. A bridge
    with raw weights has no `W_O`, so the weight of its output projection is read: `[out, in]` in a linear layer, `[in, out]` in
    GPT-2's `Conv1D`.

    Raises:
        ModelError: the block has no output projection of that size.
    """
    attention = getattr(model.blocks[layer], "attn", None)
    heads = int(model.cfg.n_heads)
    projection = getattr(getattr(attention, "o", None), "original_component", None)
    with torch.inference_mode(False), torch.no_grad():
        if projection is not None:
            weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        else:
            weight = getattr(attention, "W_O", None)
        if not isinstance(weight, Tensor) or weight.shape[-1] != model.cfg.d_model or weight[..., 0].numel() % heads:
            raise ModelError(
                f"expected an output projection to width {model.cfg.d_model} in the attention of block {layer}, got "
                f"{None if weight is None else tuple(weight.shape)}. Leave out the analyzers that need it."
            )
        return weight.detach().reshape(heads, -1, weight.shape[-1]).float()
