"""Attention whose reading is somebody else's: does it obey its pattern, and passes over keys and values kept by the caller."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.errors import ModelError
from basin_lens.model.hooks import forward_pass, measuring, point_name
from basin_lens.model.identity import device_of, hf_config, kind_of
from basin_lens.model.incremental_decoding import NO_CACHE, keeps_cache
from basin_lens.model.protocol import HookedModel

_obeying: "WeakKeyDictionary[HookedModel, bool]" = WeakKeyDictionary()


def kv_shape(model: HookedModel) -> tuple[int, int]:
    """Heads of keys and values, and numbers per head."""
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    return int(heads), int(model.cfg.d_head)


def query_width(model: HookedModel) -> int:
    """Numbers of all heads' queries of one token."""
    return int(model.cfg.n_heads) * int(model.cfg.d_head)


def obeys_pattern(model: HookedModel, layer: int) -> bool:
    """Whether the attention of `layer` reads by what hook_pattern returns: one pass of three tokens, remembered per model."""
    if model not in _obeying:
        tokens = torch.arange(3, device=device_of(model))[None]

        def own(pattern: Tensor) -> Tensor:
            return torch.eye(pattern.shape[2], device=pattern.device, dtype=pattern.dtype).expand_as(pattern)

        with measuring(model):
            plain = forward_pass(model, tokens, {})
            changed = forward_pass(model, tokens, {point_name("pattern", layer): own})
        _obeying[model] = not torch.equal(plain, changed)
    return _obeying[model]


@runtime_checkable
class RowStore(Protocol):
    """Keys and values of one layer, kept by the caller."""

    length: int
    """Tokens seen; grows with `update`."""

    def columns(self) -> Int[Tensor, "batch rows"]:
        """Places of the rows that the next query reads, its own among them; -1 for rows that stand empty."""

    def update(
        self, keys: Float[Tensor, "batch kv 1 d_head"], values: Float[Tensor, "batch kv 1 d_head"]
    ) -> tuple[Float[Tensor, "batch kv rows d_head"], Float[Tensor, "batch kv rows d_head"]]:
        """Take the token's key (rotary done) and value; all that is read, back."""


@contextmanager
def own_rows(
    model: HookedModel, stores: Sequence[RowStore]
) -> Iterator[Callable[[Int[Tensor, " batch"]], Float[Tensor, "batch vocab"]]]:
    """Steps of one token per sequence, in which block l reads what `stores[l]` hands out.

    The model is told the true number of tokens seen, so places, rotary tables and sliding windows stay right; its masks are cut to
    the rows there are.

    Returns:
        a function: tokens -> logits of the next ones.

    Raises:
        ModelError: a HookedTransformer (which counts places by the rows of its cache), a bridge without a transformers cache or one
            that drops it, or attention with a bias that cannot be cut.
    """
    if kind_of(model) == "hooked" or hf_config(model) is None:
        raise ModelError(
            "expected a TransformerBridge over a transformers model, whose key/value cache can be rewritten, got another model: a "
            "HookedTransformer counts places by the rows of its cache. Run whole sequences with TokenMerger.attached, or load the "
            "model as a bridge."
        )
    if not keeps_cache(model):
        raise ModelError(NO_CACHE)
    from transformers.cache_utils import Cache

    kept = Cache(layers=[_layer_class()(store) for store in stores])

    def cut(layer: int, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        columns = stores[layer].columns()
        length = stores[layer].length + 1

        def masked(value: object) -> object:
            if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-1] != length or value.shape[-2] != 1:
                return value
            wide = value.expand(len(columns), -1, -1, -1)
            return wide.gather(3, columns.clamp(min=0)[:, None, None].expand(-1, wide.shape[1], 1, -1))

        kwargs = {name: masked(value) for name, value in kwargs.items()}
        if isinstance(kwargs.get("position_bias"), Tensor):
            raise ModelError(
                "expected attention whose bias can be cut to the rows kept, got one of MPT's kind. Run whole sequences."
            )
        if isinstance(alibi := kwargs.get("alibi"), Tensor):
            # Bloom's and Falcon's bias by place, [batch * heads, 1, places].
            wide = alibi.reshape(len(columns), -1, 1, length)
            left = wide.gather(3, columns.clamp(min=0)[:, None, None].expand(-1, wide.shape[1], 1, -1))
            kwargs["alibi"] = left.reshape(-1, 1, left.shape[3])
        return tuple(map(masked, args)), kwargs

    def step(tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        return model(tokens[:, None], return_type="logits", past_key_values=kept, use_cache=True)[:, -1].float()

    handles = []
    try:
        for layer, block in enumerate(model.blocks):
            handles.append(
                block.get_submodule("attn").register_forward_pre_hook(
                    lambda _module, args, kwargs, layer=layer: cut(layer, args, kwargs), with_kwargs=True
                )
            )
        yield step
    finally:
        for handle in handles:
            handle.remove()


@cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class Rows(DynamicLayer):
        def __init__(self, store: RowStore) -> None:
            super().__init__()
            self.store = store
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            return self.store.update(key_states, value_states)

        def get_seq_length(self) -> int:
            return self.store.length

    return Rows
