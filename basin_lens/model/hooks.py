"""Reading a model while it runs: names of points, read-only hooks that always leave, and the forward pass itself."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from basin_lens.errors import ModelError
from basin_lens.model.identity import device_of, hf_config, kind_of, n_layers
from basin_lens.model.numerics import full_precision
from basin_lens.model.protocol import HookedModel, StateCache
from basin_lens.model.rope import forget_lengths

_SHORT = {
    **{name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "mlp_out")},
    **{name: f"attn.hook_{name}" for name in ("pattern", "k", "v", "z")},
}
# A cache may hold either name of one point: the alias that was asked for or the bridge's canonical one.
_CANONICAL = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}

_measured: "WeakKeyDictionary[HookedModel, bool]" = WeakKeyDictionary()


def point_name(point: str, layer: int) -> str:
    """Full hook name of `point` in block `layer`: `"resid_pre"`, `"pattern"`, `"v"`, or any name below the block."""
    return f"blocks.{layer}.{_SHORT.get(point, point)}"


def missing_points(model: HookedModel, points: set[str], layers: list[int]) -> list[str]:
    """Those of `points` (see `point_name`) that the model does not have, as full names."""
    return [name for layer in layers for point in sorted(points) if (name := point_name(point, layer)) not in model.hook_dict]


def cache_entry(cache: StateCache, point: str, layer: int, *, suffix: str = "") -> object:
    """What a user's cache holds for `point` of block `layer`, under any of its names, or None.

    The state that leaves a block is the state that enters the next one, so either serves for the other.
    """
    short = _SHORT.get(point, point)
    names = [point_name(point, layer)]
    if short in _CANONICAL:
        names.append(f"blocks.{layer}.{_CANONICAL[short]}")
    if point == "resid_post":
        names += [f"blocks.{layer + 1}.hook_resid_pre", f"blocks.{layer + 1}.hook_in"]
    if point == "resid_pre" and layer > 0:
        names += [f"blocks.{layer - 1}.hook_resid_post", f"blocks.{layer - 1}.hook_out"]
    held = set(cache.keys())
    return next((cache[name + suffix] for name in names if name + suffix in held), None)


@contextmanager
def reading(model: HookedModel, readers: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call `readers[name](tensor)` whenever the point `name` is passed; gone after the block, also on errors.

    A reader that returns a tensor puts it in the place of the one it read.
    """
    points = model.hook_dict
    handles = []
    try:
        for name, reader in readers.items():
            point: nn.Module = getattr(points[name], "_target", points[name])
            handles.append(point.register_forward_hook(lambda _module, _inputs, output, reader=reader: reader(output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def measuring(model: HookedModel, *, gradients: bool = False) -> Iterator[None]:
    """The state in which every measurement runs: no dropout, eager attention, full precision, gradients on or off; put back after.

    Eager attention because the other kernels neither show their pattern nor take a 4-D mask. Inside another `measuring` of the
    same model only the gradients are switched: walking a model's modules costs more than one packed block call.
    """
    # A caller's inference_mode must not leak into tensors that we keep or differentiate.
    modes = [torch.inference_mode(False), torch.enable_grad() if gradients else torch.no_grad()]
    if _measured.get(model):
        with modes[0], modes[1], full_precision():
            yield
        return
    modules = {id(m): m for root in (model, getattr(model, "original_model", None)) if root is not None for m in root.modules()}
    trained = [m for m in modules.values() if m.training]
    config = hf_config(model)
    attention = getattr(config, "_attn_implementation", None)
    switch = getattr(getattr(model, "original_model", None), "set_attn_implementation", None)
    if attention in (None, "eager"):
        switch = None
    try:
        for module in trained:
            module.training = False
        if switch is not None:
            switch("eager")
        _measured[model] = True
        forget_lengths(model)
        with modes[0], modes[1], full_precision(), _at_home(model):
            yield
    finally:
        _measured.pop(model, None)
        for module in trained:
            module.training = True
        if switch is not None:
            switch(attention)


def _at_home(model: HookedModel) -> AbstractContextManager[object]:
    """Where a caller's `set_default_device` names another place, such as meta: what transformers makes without naming one stands
    by the model, as with no default."""
    home, default = device_of(model), torch.get_default_device()
    return nullcontext() if default.type in ("cpu", home.type) else home


def forward_pass(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    readers: Mapping[str, Callable[[Tensor], Tensor | None]],
    *,
    gradients: bool = False,
) -> Float[Tensor, "*shape vocab"]:
    """One pass over right-padded tokens, logits out. Right padding is exact for the real positions of a causal model.

    Args:
        model: a hooked model.
        tokens: token ids on any device; padded on the right with any valid id.
        readers: see `reading`.
        gradients: build a graph from the embedding on, also when the parameters are frozen.
    """
    extra: dict[str, Tensor] = {}
    if kind_of(model) == "hooked":
        # Otherwise HookedTransformer guesses padding from token ids when its tokenizer pads on the left.
        extra["attention_mask"] = torch.ones_like(tokens)
    start = {"hook_embed": lambda t: t.detach().requires_grad_()} if gradients else {}
    if gradients and "hook_embed" not in model.hook_dict:
        raise ModelError("expected the hook point hook_embed for a gradient pass, got a model without it.")
    with reading(model, start) if start else nullcontext(), reading(model, readers):
        return model(tokens, return_type="logits", **extra)


class _PassEndedError(Exception):
    """A pass has come as far as it was asked to; it never leaves `pass_until`."""


def pass_until(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], readers: Mapping[str, Callable[[Tensor], Tensor | None]], last: str
) -> None:
    """One pass over right-padded tokens that ends once the point `last` was read: no block above it runs, and no unembedding.

    Args:
        model, tokens: as for `forward_pass`; gradients are not built.
        readers: see `reading`; those of points behind `last` are never called.
        last: one of their names.
    """

    def read_and_end(value: Tensor) -> None:
        readers[last](value)
        raise _PassEndedError

    try:
        forward_pass(model, tokens, {**readers, last: read_and_end})
    except _PassEndedError:
        return
    raise ModelError(f"expected a pass through the hook point {last}, got one that ended without it. Use another model class.")


def all_layers(model: HookedModel) -> list[int]:
    """0 .. number of blocks - 1."""
    return list(range(n_layers(model)))
