"""Calling one block by itself, with the very arguments that it gets inside the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.errors import TransportError
from basin_lens.model.hooks import forward_pass, measuring, point_name, reading
from basin_lens.model.identity import kind_of, n_layers
from basin_lens.model.protocol import HookedModel


class _CacheSlot:
    """Stands where the model passed its key/value cache to the block."""

    def __repr__(self) -> str:
        return "<key/value cache>"


CACHE_SLOT = _CacheSlot()


def is_cache_slot(value: object) -> bool:
    """Whether a recorded argument stands for the block's key/value cache."""
    return value is CACHE_SLOT


@dataclass(frozen=True)
class BlockCall:
    """The arguments that one block got in a pass over `[batch, pos]` tokens, without the states themselves."""

    args: tuple[object, ...]
    kwargs: dict[str, object] = field(repr=False)

    def leaves(self) -> list[object]:
        """Every argument, in order."""
        return [*self.args, *self.kwargs.values()]

    def widened(self, copies: int) -> "BlockCall":
        """The same for a batch of `copies`: 4-D masks of a batch of one are repeated, which some models insist on."""

        def wide(value: object) -> object:
            if isinstance(value, Tensor) and value.ndim == 4 and len(value) == 1:
                return value.expand(copies, -1, -1, -1)
            return value

        return BlockCall(tuple(map(wide, self.args)), {name: wide(value) for name, value in self.kwargs.items()})


class FrozenPrefix:
    """A key/value cache that shows every new row the same prefix and stores nothing."""

    is_compileable = False

    def __init__(
        self, keys: Float[Tensor, "batch kv columns d_head"], values: Float[Tensor, "batch kv columns d_head"], length: int
    ) -> None:
        """The prefix fills the first `length` columns; the rest is room for the new rows, so that it is copied only once."""
        self.keys, self.values, self.length = keys, values, length

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Prefix first, then the new rows."""
        self.keys[:, :, self.length :], self.values[:, :, self.length :] = keys, values
        return self.keys, self.values

    def get_seq_length(self, *_: object, **__: object) -> int:
        """Length of the prefix."""
        return self.length


class _Recorded(Exception):  # noqa: N818 - a signal, not an error
    """Carries tensors out of a block call that needs to go no further."""


class _RecordingPrefix:
    """An empty key/value cache that ends the block call as soon as it has seen the keys and values."""

    is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        raise _Recorded(keys, values)

    def get_seq_length(self, *_: object, **__: object) -> int:
        return 0


@dataclass(frozen=True)
class PaddedPrefix:
    """HookedTransformer's cache entry: each row of the batch sees its own prefix, padded on the left. Stores nothing.

    `seen`: which columns are real. HookedTransformer masks the others, and counts rotary positions from the real ones.
    """

    past_keys: Float[Tensor, "rows columns kv d_head"]
    past_values: Float[Tensor, "rows columns kv d_head"]
    seen: Bool[Tensor, "rows columns"]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix first, then the new rows."""
        return torch.cat([self.past_keys, keys], dim=1), torch.cat([self.past_values, values], dim=1)


class _RecordingEntry:
    """HookedTransformer's cache entry, empty, that ends the block call as soon as it has seen the keys and values."""

    def __init__(self, like: Tensor) -> None:
        self.past_keys = like.new_empty(len(like), 0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise _Recorded(keys, values)


def keys_and_values(
    model: HookedModel, layer: int, call: BlockCall, states: Float[Tensor, "batch pos d"]
) -> tuple[Float[Tensor, "batch a b d_head"], Float[Tensor, "batch a b d_head"]]:
    """Keys and values that block `layer` computes from `states`, before the grouped-query repeat.

    The block runs only as far as its cache: attention and feed-forward are most of its cost.

    Returns:
        on a bridge `[batch, kv, pos, d_head]`, keys after rotary; on a HookedTransformer `[batch, pos, kv, d_head]`, before.

    Raises:
        TransportError: the block does not use its cache.
    """
    try:
        call_block(model, layer, call, states, _RecordingEntry(states) if kind_of(model) == "hooked" else _RecordingPrefix())
    except _Recorded as seen:
        return seen.args[0].detach(), seen.args[1].detach()
    raise TransportError(
        f"expected block {layer} to put its keys and values into its cache, got a block that does not. "
        "Use R1; on a bridge, TransformerLens up to 4.3 needs transformers below 5.24: pip install 'transformers<5.24'."
    )


def record_calls(model: HookedModel, tokens: Int[Tensor, "batch pos"], *, only_first: bool = False) -> list[BlockCall]:
    """The arguments of every block in one pass over `tokens`: masks, rotary tables, positions, alibi, whatever there is.

    They depend on batch and length only, so any token ids will do.

    Args:
        model: a hooked model.
        tokens: token ids.
        only_first: the pass ends behind the last block and computes none of them: each answers what enters it, in the form that the
            first block's answer for one token has. Where that form says more than states, the first block is computed, and its
            answer stands for the answers of the others.

    Raises:
        TransportError: a block ran more than once in the pass (recurrent depth), or not at all.
    """
    calls: list[list[BlockCall]] = [[] for _ in range(n_layers(model))]

    def remember(layer: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        rest = {name: _slot(value) for name, value in kwargs.items() if name not in {"hidden_states", "resid_pre"}}
        calls[layer].append(BlockCall(tuple(_slot(value) for value in args[1:]), rest))

    handles = []
    with measuring(model), _first_block_alone(model) if only_first else nullcontext():
        try:
            for layer, block in enumerate(model.blocks):
                handles.append(
                    block.register_forward_pre_hook(
                        lambda _module, args, kwargs, layer=layer: remember(layer, args, kwargs), with_kwargs=True
                    )
                )
            forward_pass(model, tokens, {})
        finally:
            for handle in handles:
                handle.remove()
    for layer, seen in enumerate(calls):
        if len(seen) != 1:
            raise TransportError(
                f"expected block {layer} to run once in a forward pass, got {len(seen)} times: with recurrent depth or "
                "skipped blocks the map from layer to layer is not defined. Use another model."
            )
    return [seen[0] for seen in calls]


@contextmanager
def _first_block_alone(model: HookedModel) -> Iterator[None]:
    """Passes compute the first block on one token, or on theirs if they must; the final norm ends the pass."""
    answers: list[object] = []
    answered = form_of_answers(model)

    def leave(*_: object) -> None:
        raise _Recorded

    def answer(*args: Any, **kwargs: Any) -> object:
        if answered is None:
            return answers[-1]
        return answered(args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["resid_pre"])

    others = [vars(block) for block in list(model.blocks)[1 if answered is None else 0 :]]
    own = [held.get("forward") for held in others]
    handles = [model.blocks[0].register_forward_hook(lambda _module, _args, output: answers.append(output))]
    if (norm := getattr(model, "ln_final", None)) is not None:
        handles.append(norm.register_forward_pre_hook(leave))
    try:
        for held in others:
            held["forward"] = answer
        with suppress(_Recorded):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for held, forward in zip(others, own, strict=True):
            held.pop("forward", None)
            if forward is not None:
                held["forward"] = forward


def form_of_answers(model: HookedModel) -> Callable[[Tensor], object] | None:
    """What a block answers besides states, seen on one token: states -> such an answer. None: something that depends on them."""
    answers: list[object] = []

    def leave(_module: object, _args: object, output: object) -> None:
        answers.append(output)
        raise _Recorded

    tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    handle = model.blocks[0].register_forward_hook(leave)
    try:
        with suppress(_Recorded):
            forward_pass(model, tokens, {})
    finally:
        handle.remove()
    match answers:
        case [Tensor(ndim=3)]:
            return lambda states: states
        case [(Tensor(ndim=3), *rest)] if isinstance(answers[0], tuple) and all(value is None for value in rest):
            return lambda states: (states, *rest)
    return None


def call_block(
    model: HookedModel,
    layer: int,
    call: BlockCall,
    states: Float[Tensor, "batch pos d"],
    prefix: object = None,
    *,
    until_mid: bool = False,
    run: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> Float[Tensor, "batch pos d"]:
    """Run block `layer` on `states` with the arguments of `call`, the cache replaced by `prefix` (None: no cache).

    With `until_mid`, it goes no further than `resid_mid`, and answers with that. `run` takes the place of the model's own block.
    """

    def fill(value: object) -> object:
        return prefix if is_cache_slot(value) else value

    def leave(state: Tensor) -> None:
        raise _Recorded(state)

    kwargs = {name: fill(value) for name, value in call.kwargs.items()}
    if prefix is None and "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if prefix is not None and "past_kv_cache_entry" in kwargs:
        kwargs["past_kv_cache_entry"] = prefix
        if isinstance(prefix, PaddedPrefix):
            seen = torch.nn.functional.pad(prefix.seen, (0, states.shape[1]), value=True)
            kwargs["attention_mask"] = seen.long()
    args = tuple(fill(value) for value in call.args)
    given = states.to(next(model.parameters()).dtype)
    if until_mid:
        try:
            with reading(model, {point_name("resid_mid", layer): leave}):
                model.blocks[layer](given, *args, **kwargs)
        except _Recorded as seen_mid:
            return seen_mid.args[0].float().view(given.shape)  # OPT's feed-forward sees tokens without their batch
        raise TransportError(f"expected block {layer} to pass its hook_resid_mid, got a block that does not.")
    output = (run or model.blocks[layer])(given, *args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output).float()


def feed_forward(
    model: HookedModel, layer: int, call: BlockCall, mids: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos d"]:
    """The second half of block `layer`: `resid_mid` -> `resid_post`, with `mids` put in.

    On a bridge, the point `hook_resid_mid` is the input of the feed-forward's norm only, so the sum is done here.
    """
    read: list[Tensor] = []
    given = mids.to(next(model.parameters()).dtype)
    readers = {
        point_name("resid_mid", layer): lambda t: given.view(t.shape),
        point_name("mlp_out", layer): lambda t: read.append(t),
    }
    with reading(model, readers):
        call_block(model, layer, call, mids)
    if len(read) != 1:
        raise TransportError(f"expected block {layer} to pass its hook_mlp_out once, got {len(read)} times.")
    return (given + read[0].view(given.shape)).float()


def rerun_with_state(
    model: HookedModel,
    tokens: Int[Tensor, " pos"],
    layer: int,
    position: int,
    states: Float[Tensor, "k d"],
    *,
    until_mid: bool = False,
) -> Float[Tensor, "k d"]:
    """The oracle (route R0): rerun the whole model k times with `states` put before block `layer` at `position`.

    Returns:
        the states that leave the block at that position (`until_mid`: its attention). Costs k full passes; public hooks only.
    """
    read: list[Tensor] = []
    after = "resid_mid" if until_mid else "resid_post"
    readers = {
        point_name("resid_pre", layer): _putting(position, states),
        point_name(after, layer): lambda t: read.append(t),
    }
    with measuring(model):
        forward_pass(model, tokens.expand(len(states), -1), readers)
    # OPT's feed-forward sees tokens without their batch.
    return read[0].detach().view(len(states), len(tokens), -1)[:, position].float()


def rerun_to_logits(
    model: HookedModel, tokens: Int[Tensor, " pos"], layer: int, position: int, states: Float[Tensor, "k d"]
) -> Float[Tensor, "k pos vocab"]:
    """Rerun the model k times with `states` put before block `layer` at `position`, to the logits."""

    with measuring(model):
        return forward_pass(
            model, tokens.expand(len(states), -1), {point_name("resid_pre", layer): _putting(position, states)}
        ).float()


def _putting(position: int, states: Float[Tensor, "k d"]) -> Callable[[Tensor], Tensor]:
    def put(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, position] = states.to(state.dtype)
        return state

    return put


def final_norm(model: HookedModel, states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """The norm between the last block and the unembedding."""
    with measuring(model):
        dtype = next(model.parameters()).dtype
        flat = states.reshape(1, -1, states.shape[-1]).to(dtype)
        return model.ln_final(flat).float().reshape(states.shape)


def logits_of(model: HookedModel, states: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos vocab"]:
    """Logits of states that leave the last block, by the model's own code: final norm, head, and whatever follows the head.

    What follows (Gemma's soft cap, Cohere's and Granite's scale) has no hook point, so the states are put in the place of one
    token's in a pass over that token: the blocks run on one token, the head on all states. A model that insists on the shape it
    began with (GPT-BigCode) makes a whole pass.
    """
    last = point_name("resid_post", n_layers(model) - 1)
    given = states.to(next(model.parameters()).device, next(model.parameters()).dtype)

    def run(rows: Tensor, batch: int, pos: int) -> Tensor:
        tokens = torch.zeros(batch, pos, dtype=torch.int64, device=rows.device)
        return forward_pass(model, tokens, {last: lambda _: rows}).float().view(*states.shape[:2], -1)

    with measuring(model):
        try:
            return run(given.reshape(-1, 1, given.shape[2]), 1, 1)
        except RuntimeError as error:  # torch raises it where shapes do not fit
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return run(given, *states.shape[:2])


def entering(model: HookedModel, tokens: Int[Tensor, "batch pos"], layer: int = 0) -> Float[Tensor, "batch pos d"]:
    """States that enter a block, of right-padded tokens. The pass goes no further."""

    def leave(state: Tensor) -> None:
        raise _Recorded(state)

    try:
        with measuring(model):
            forward_pass(model, tokens, {point_name("resid_pre", layer): leave})
    except _Recorded as seen:
        return seen.args[0].detach().float()
    raise TransportError(
        f"expected the model to pass the hook_resid_pre of block {layer}, got one that does not. Use another model."
    )


def _slot(value: object) -> object:
    # By type, because the argument's name varies and GPT-2 passes it by position.
    return CACHE_SLOT if any(cls.__name__ == "Cache" for cls in type(value).__mro__) else value
