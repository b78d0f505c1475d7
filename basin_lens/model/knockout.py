"""Taking one token out of the attention of all tokens after it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.errors import ModelError
from basin_lens.model.hooks import all_layers, missing_points, point_name, reading
from basin_lens.model.identity import hf_config, kind_of
from basin_lens.model.protocol import HookedModel


@contextmanager
def knocked_out(model: HookedModel, columns: Int[Tensor, " batch"], length: int, first: int = 0) -> Iterator[None]:
    """Passes over `[batch, length]` tokens in which no later query of sequence b attends to column `columns[b]`, in any block.

    `first`: the passes are over the tokens from this place on, the keys of those before it in a cache.

    What the token itself reads and predicts stays as it is; nothing of it reaches a later position. Hidden in the blocks' masks on
    a bridge, in the scores of a HookedTransformer; every block's pattern is checked to have nothing in the column.

    Raises:
        ModelError: a block gets no mask, or does not obey it.
    """
    layers = all_layers(model)
    if missing := missing_points(model, {"pattern"}, layers):
        raise ModelError(f"expected attention patterns to check the knock-out by, got a model without {missing[0]}.")
    place = torch.arange(length, device=columns.device)
    # [batch, 1, query, key]: true where a later query looks at the column.
    gone = ((place[first:, None] > columns[:, None, None]) & (place == columns[:, None, None]))[:, None]
    with ExitStack() as stack:
        if kind_of(model) == "hooked":
            stack.enter_context(reading(model, {point_name("attn.hook_attn_scores", layer): _hide(gone) for layer in layers}))
        else:
            stack.enter_context(_masks(model, gone))
        stack.enter_context(reading(model, {point_name("pattern", layer): _check(gone, layer) for layer in layers}))
        yield


def _hide(gone: Bool[Tensor, "batch 1 query key"]) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores.masked_fill(gone, torch.finfo(scores.dtype).min)


def _check(gone: Bool[Tensor, "batch 1 query key"], layer: int) -> Callable[[Tensor], None]:
    def check(pattern: Tensor) -> None:
        if float((pattern.detach() * gone).abs().max()) > 1e-6:
            raise ModelError(
                f"expected block {layer} to obey its attention mask, got attention to a masked token. Leave out Erasure."
            )

    return check


@contextmanager
def _masks(model: HookedModel, gone: Bool[Tensor, "batch 1 query key"]) -> Iterator[None]:
    """Every 4-D mask among the blocks' arguments, with the column hidden as the mask hides the future.

    A native bridge gives its blocks none, and adds to its own what it is given: true hides.
    """
    native = hf_config(model) is None

    def changed(value: object) -> object:
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-2:] != gone.shape[-2:]:
            return value
        # Whatever stands for "hidden" (a large negative number, minus infinity, False): the first query may not see the last key.
        return torch.where(gone, value[:, :, :1, -1:], value)

    def before(layer: int, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        if native and kwargs.get("attention_mask") is None:
            return args, {**kwargs, "attention_mask": gone}
        new = tuple(map(changed, args)), {name: changed(value) for name, value in kwargs.items()}
        if all(a is b for a, b in zip((*args, *kwargs.values()), (*new[0], *new[1].values()), strict=True)):
            raise ModelError(f"expected block {layer} to get a 4-D attention mask, got none. Leave out Erasure.")
        return new

    handles = []
    try:
        for layer, block in enumerate(model.blocks):
            handles.append(
                block.register_forward_pre_hook(
                    lambda _module, args, kwargs, layer=layer: before(layer, args, kwargs), with_kwargs=True
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
