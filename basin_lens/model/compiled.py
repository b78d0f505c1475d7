"""A block compiled: the layer of transformers under a bridge, without its hook points, through `torch.compile`.

Hook points stop the compiler at every one of them. The layer under them does the same arithmetic with the same weights (on SmolLM2
bit for bit, before it is compiled); whoever uses it proves that on the states at hand, see `basin_lens.transport.proof`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from basin_lens.errors import ModelError
from basin_lens.model.identity import kind_of
from basin_lens.model.protocol import HookedModel

# Of the compiled function: a kind of block more, or a mask or cache where there was none. Beyond, it would run uncompiled unsaid.
_MOST_FORMS = 64

# States, alone or with what else a block answers.
Answer = Tensor | tuple[Tensor, ...]


class CompiledBlock:
    """Block `layer`, called as `model.blocks[layer]` is. The first call compiles (half a minute); blocks of one kind do so once.

    Raises:
        ModelError: a block that cannot be compiled, and why.
    """

    def __init__(self, model: HookedModel, layer: int) -> None:
        if kind_of(model) == "hooked":
            raise ModelError("a HookedTransformer has no layer of transformers under its hook points")
        block = model.blocks[layer]
        if (hook := _hook_in(block)) is not None:
            raise ModelError(f"a compiled block would not run the hook at {hook}")
        self._plain = _without_hook_points(block)
        takes = inspect.signature(self._plain.forward).parameters
        self._takes = None if any(each.kind == each.VAR_KEYWORD for each in takes.values()) else frozenset(takes)

    def __call__(self, states: Float[Tensor, "batch pos d"], *args: object, **kwargs: object) -> Answer:
        """What the block answers.

        Raises:
            ModelError: no compiler, or one that stops at this block.
        """
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        if not hasattr(config, "fail_on_recompile_limit_hit"):
            raise ModelError(f"torch {torch.__version__} does not say when it stops compiling; newer versions do")
        if self._takes is not None:  # as the bridge does: a decoder is told nothing of encoders
            kwargs = {name: value for name, value in kwargs.items() if name in self._takes}
        run = _compiled() if min(states.shape[:2]) > 1 else _forward  # one alone would be compiled anew, and gain little
        try:
            with config.patch(recompile_limit=_MOST_FORMS, fail_on_recompile_limit_hit=True):
                return run(self._plain, states, args, kwargs)
        except (TorchDynamoException, ImportError, OSError) as error:
            said = str(error).strip().splitlines() or [""]
            raise ModelError(f"torch.compile stops at this block ({type(error).__name__}: {said[0]})") from error


def _forward(block: nn.Module, states: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Answer:
    return block(states, *args, **kwargs)


@cache
def _compiled() -> Callable[..., Answer]:
    """One function for all blocks: what is compiled for one serves all of its kind. No part of it may stay uncompiled."""
    return torch.compile(_forward, fullgraph=True, dynamic=True)


def _hook_in(block: nn.Module) -> str | None:
    """A place in a block where somebody hooked in; what the libraries hook in themselves copies or changes shapes only."""
    for name, module in block.named_modules():
        points = [*(getattr(module, "fwd_hooks", None) or ()), *(getattr(module, "bwd_hooks", None) or ())]
        hooks = [getattr(point, "user_hook", None) for point in points]
        for hook in (*hooks, *module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers.")):
                return name or "its end"
    return None


def _without_hook_points(module: nn.Module) -> nn.Module:
    """The same modules and weights, the bridge's own left out."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    while isinstance(module, GeneralizedComponent):
        inner = module.original_component
        if not isinstance(inner, nn.Module):
            raise ModelError(f"{type(module).__name__} has no layer of transformers under it")
        module = inner
    plain = copy.copy(module)
    vars(plain).update(
        _modules={name: None if part is None else _without_hook_points(part) for name, part in module._modules.items()}
    )
    vars(plain).update({name: {} for name in ("_forward_hooks", "_forward_pre_hooks")})
    if hasattr(plain, "layer_idx"):
        vars(plain)["layer_idx"] = (
            0  # caches that show one layer's prefix do not ask; a number of its own would compile every layer
        )
    return plain
