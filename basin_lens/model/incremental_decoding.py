"""One token after another, many sequences at once: B streams that advance together over a preallocated key/value cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.errors import ModelError
from basin_lens.model.hooks import forward_pass, measuring
from basin_lens.model.identity import device_of, hf_config, kind_of, n_context, n_layers, tokenizer_of, vocabulary_size
from basin_lens.model.protocol import HookedModel

_MOST_UNFOLDED = 6 << 30  # bytes
NO_CACHE = (
    "expected a model that keeps keys and values in the cache it is given, got one that does not. TransformerLens up to 4.3 needs "
    "transformers below 5.24: pip install 'transformers<5.24'."
)


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Torch works with `count` threads; put back after, also on errors. Sums are made in another order with another count."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def start_token(model: HookedModel) -> int:
    """Id of the token that opens a sequence: the tokenizer's BOS, else its end-of-text token, else 0."""
    tokenizer = tokenizer_of(model)
    ids = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((int(found) for found in ids if found is not None), 0)


def end_tokens(model: HookedModel) -> frozenset[int]:
    """Ids after which a text is over: what the tokenizer and the settings of model and generation name so, and `<|endoftext|>`.

    Settings count only where the tokenizer has that id for a special token: many hold an id that nobody chose. Without a tokenizer
    none are known.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return frozenset()
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    inner = getattr(model, "original_model", None)
    told = [getattr(one, "eos_token_id", None) for one in (hf_config(model), getattr(inner, "generation_config", None))]
    named = {number for one in told for number in (one if isinstance(one, list | tuple) else [one]) if number in special}
    own: int | None = tokenizer.eos_token_id
    also = {number for number, token in special.items() if number in named or token == "<|endoftext|>"}
    return frozenset(also if own is None else {own, *also})


def cache_bytes(model: HookedModel, batch: int, window: int) -> int:
    """Memory of the keys and values of `batch` sequences of `window` tokens, in bytes, as the model makes them."""
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    return 2 * n_layers(model) * batch * window * int(heads) * int(model.cfg.d_head) * next(model.parameters()).element_size()


def keeps_cache(model: HookedModel) -> bool:
    """Whether the model puts keys and values into a transformers cache that it is given: one token is passed to see.

    TransformerLens up to 4.3 drops the cache of transformers 5.24 and later (its blocks call it by another name): every cached step
    would attend to itself alone.
    """
    if kind_of(model) == "hooked":
        return True
    if hf_config(model) is None:
        return False
    past = _BridgePast(model, 1, 1)
    with measuring(model):
        past.forward(torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
    return past.length == 1


class Stepper:
    """`step(tokens)` -> logits of the next token, for `batch` sequences that advance together; made by `stepping`."""

    def __init__(self, model: HookedModel, batch: int, window: int, groups: int = 1) -> None:
        self.batch, self.window, self.vocab = batch, window, vocabulary_size(model)
        self._device = device_of(model)
        self._past = _past(model, batch, window, groups)

    @property
    def position(self) -> int:
        """Tokens that every sequence holds."""
        return self._past.length

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append one token to each sequence.

        Returns:
            float32 logits of the token after it, on the CPU.

        Raises:
            ModelError: the window is full, another number of tokens, or a model that keeps no keys and values.
        """
        if len(tokens) != self.batch or self.position >= self.window:
            raise ModelError(
                f"expected {self.batch} tokens and a free place among {self.window}, got {len(tokens)} tokens at place "
                f"{self.position}. Reset the stepper at the end of its window."
            )
        before = self.position
        logits = self._past.forward(tokens.to(self._device)[:, None])
        if self.position != before + 1:
            raise ModelError(NO_CACHE)
        return logits[:, -1].float().cpu()

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self._past.reset()

    def pretend(self, length: int) -> None:
        """Go to place `length` as if the tokens held had been repeated up to it: to see how far places compute, in no time.

        Raises:
            ModelError: nothing to repeat, a place behind, or one beyond the window.
        """
        if not 0 < self.position <= length <= self.window:
            raise ModelError(f"expected a place between {max(1, self.position)} and {self.window}, got {length}.")
        self._past.pretend(length)


@contextmanager
def stepping(model: HookedModel, batch: int, window: int) -> Iterator[Stepper]:
    """A `Stepper` over `model`: no dropout, eager attention, no gradients; the model is as it was after the block.

    Keys and values go into memory set aside once, for `batch` sequences of `window` tokens. A bridge gets a transformers `Cache`
    with layers of our own, which hand out views of that memory (a `StaticCache` would attend over all of the window at every step);
    a HookedTransformer (3.9) gets entries of our own; a native bridge takes no cache, so its sequences are computed anew at every
    step: exact, and slow.

    Args:
        model: a hooked model.
        batch: number of sequences.
        window: most tokens of each, at most the model's context.

    Raises:
        ModelError: a window longer than the model's context, or a cache that stays empty.

    Example:
        >>> import torch
        >>> import basin_lens as bl
        >>> from basin_lens.model.incremental_decoding import stepping
        >>> model = bl.load_model()
        >>> with stepping(model, batch=2, window=8) as stepper:
        ...     stepper.step(torch.tensor([1, 1])).shape
        torch.Size([2, 49152])
    """
    if not 1 <= window <= n_context(model) or batch < 1:
        raise ModelError(
            f"expected a batch of 1 or more and a window of 1 to {n_context(model)} tokens (the model's context), got {batch} and "
            f"{window}."
        )
    if hf_config(model) is not None and not keeps_cache(model):
        raise ModelError(NO_CACHE)
    with measuring(model), _unfolded(model, batch, window) as groups:
        yield Stepper(model, batch, window, groups)


@contextmanager
def _unfolded(model: HookedModel, batch: int, window: int) -> Iterator[int]:
    """Grouped keys and values are kept once for each query head, so that no step has to copy all of them.

    Gives how often each is kept, 1 for no change. The repeating that the blocks do at every step took three quarters of it at 500
    places. Not done where the memory is too dear.
    """
    bridges = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    # Only this kind reads the number of repeats from there and nothing else by it.
    known = {type(bridge).__name__ for bridge in bridges} == {"PositionEmbeddingsAttentionBridge"}
    cores = [bridge.original_component for bridge in bridges if bridge is not None] if known else []
    found = {getattr(core, "num_key_value_groups", None) for core in cores}
    groups = found.pop() if len(found) == 1 else None
    if not isinstance(groups, int) or groups < 2 or groups * cache_bytes(model, batch, window) > _MOST_UNFOLDED:
        yield 1
        return
    try:
        for core in cores:
            core.num_key_value_groups = 1
        yield groups
    finally:
        for core in cores:
            core.num_key_value_groups = groups


def _past(model: HookedModel, batch: int, window: int, groups: int) -> "_HookedPast | _BridgePast | _Recomputed":
    if kind_of(model) == "hooked":
        return _HookedPast(model, batch, window)
    return _BridgePast(model, window, groups) if hf_config(model) is not None else _Recomputed(model)


class _BridgePast:
    """A transformers `Cache` whose layers are views of memory set aside."""

    def __init__(self, model: HookedModel, window: int, groups: int) -> None:
        from transformers.cache_utils import Cache

        # Layers come into being with their first keys: some models share them between blocks.
        made: Any = partial(_layer_class(), window, groups)
        self._model, self.cache = model, Cache(layer_class_to_replicate=made)

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model(tokens, return_type="logits", past_key_values=self.cache, use_cache=True)

    def reset(self) -> None:
        self.cache.reset()

    def pretend(self, length: int) -> None:
        layers: Any = self.cache.layers
        for layer in layers:
            _repeat(layer.room, 2, layer.length, length)
            layer.length = length


def filled_past(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> tuple[Float[Tensor, "batch pos vocab"], _BridgePast]:
    """Logits of a pass over whole sequences, and the keys and values that it left."""
    past = _BridgePast(model, tokens.shape[1], 1)
    return past.forward(tokens), past


def cache_from(past: _BridgePast, rows: Int[Tensor, " copies"], length: int) -> object:
    """A transformers `Cache` of copies of the sequences `rows`, of which it holds the first `length` tokens."""
    from transformers.cache_utils import Cache

    layers: Any = past.cache.layers
    kind: Any = partial(_layer_class(), layers[0].window, 1)
    made = Cache(layer_class_to_replicate=kind)
    for held in layers:
        layer = _layer_class()(held.window, 1)
        layer.hold(tuple(room[rows, :, : held.window] for room in held.room), length)
        made.layers.append(layer)
    return made


@cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class Slots(DynamicLayer):
        """Keys and values `[batch, kv, window, d_head]`; a sliding window is left to the block's mask, so all are kept."""

        def __init__(self, window: int, groups: int) -> None:
            super().__init__()
            self.window, self.groups, self.length = window, groups, 0
            self.room: tuple[Tensor, ...] = ()

        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            if self.groups > 1:
                key_states, value_states = (t.repeat_interleave(self.groups, dim=1) for t in (key_states, value_states))
            if not self.room:
                self.hold(tuple(t.new_empty(*t.shape[:2], self.window, t.shape[3]) for t in (key_states, value_states)), 0)
            end = self.length + key_states.shape[2]
            for place, new in zip(self.room, (key_states, value_states), strict=True):
                place[:, :, self.length : end] = new
            self.length = end
            self.keys, self.values = (place[:, :, :end] for place in self.room)
            return self.keys, self.values

        def hold(self, room: tuple[Tensor, ...], length: int) -> None:
            """Work in this room, whose first places are filled."""
            self.dtype, self.device, self.is_initialized = room[0].dtype, room[0].device, True
            self.room, self.length = room, length

        def get_seq_length(self) -> int:
            return self.length

        def reset(self) -> None:
            self.length = 0

    return Slots


class _HookedPast:
    """HookedTransformer's key/value cache: a mask, and an entry per block."""

    frozen = False

    def __init__(self, model: HookedModel, batch: int, window: int) -> None:
        cfg = model.cfg
        heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        device = device_of(model)
        make = partial(torch.empty, (batch, window, heads, cfg.d_head), dtype=cfg.dtype, device=device)
        self._model = model
        self.entries = [_HookedEntry(make(), make()) for _ in range(cfg.n_layers)]
        self._seen = torch.ones(batch, window, dtype=torch.long, device=device)

    @property
    def length(self) -> int:
        return self.entries[-1].length

    def __getitem__(self, layer: int) -> "_HookedEntry":
        return self.entries[layer]

    def append_attention_mask(self, attention_mask: Tensor) -> Tensor:
        return self._seen[:, : self.length + attention_mask.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens), past_kv_cache=self)

    def reset(self) -> None:
        for entry in self.entries:
            entry.length = 0

    def pretend(self, length: int) -> None:
        for entry in self.entries:
            _repeat((entry.keys, entry.values), 1, entry.length, length)
            entry.length = length


class _HookedEntry:
    """Keys and values of one block, `[batch, window, kv, d_head]`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    @property
    def past_keys(self) -> Tensor:
        return self.keys[:, : self.length]

    @property
    def past_values(self) -> Tensor:
        return self.values[:, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[1]
        self.keys[:, self.length : end], self.values[:, self.length : end] = keys, values
        self.length = end
        return self.past_keys, self.past_values


class _Recomputed:
    """The tokens themselves, computed anew at every step."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._tokens: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self._tokens is None else int(self._tokens.shape[1])

    def forward(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], dim=1)
        return forward_pass(self._model, self._tokens, {})

    def reset(self) -> None:
        self._tokens = None

    def pretend(self, length: int) -> None:
        assert self._tokens is not None
        self._tokens = self._tokens[:, torch.arange(length, device=self._tokens.device) % self.length]


def _repeat(rooms: tuple[Tensor, ...], axis: int, held: int, length: int) -> None:
    """Fill the places `held` to `length` along `axis` with what the places before them hold, again and again."""
    for room in rooms:
        source = torch.arange(held, length, device=room.device) % held
        room.narrow(axis, held, length - held).copy_(room.index_select(axis, source))
