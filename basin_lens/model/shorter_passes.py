"""Passes that leave out what nobody looks at: blocks below states that are put in, and tokens before a change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.model.blocks import form_of_answers
from basin_lens.model.hooks import forward_pass, point_name
from basin_lens.model.identity import hf_config, kind_of
from basin_lens.model.incremental_decoding import cache_from, filled_past
from basin_lens.model.protocol import HookedModel

Form = Callable[[Tensor], object]

# Whatever a model raises that cannot work without some blocks, or with a cache or a mask of ours: its passes are whole then. What
# else it means, the whole pass raises again.
CANNOT = (RuntimeError, LookupError, TypeError, AttributeError, ValueError)

# By layer, under which hooks it was proved, and how the blocks below it answer what enters them; None: passes cannot begin there.
_begins: "WeakKeyDictionary[HookedModel, dict[int, tuple[object, Form | None]]]" = WeakKeyDictionary()


def pass_from(
    model: HookedModel, layer: int, tokens: Int[Tensor, "batch pos"], states: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits with `states` put before block `layer`. Blocks below it are left out: whatever they make, the states take its place.

    Proved for a model, its hooks and a layer, on one sequence: where the logits are not those of a whole pass (a block or a hook
    that hands on more than states), passes are whole.
    """
    known, hooks = _begins.setdefault(model, {}), _hooks_on(model)
    if layer not in known or known[layer][0] != hooks:
        known[layer] = hooks, _proved(model, layer, tokens[:1], states[:1].detach()) if layer else None
    with _begun(model, layer, known[layer][1]):
        return _with_states(model, layer, tokens, states)


def _hooks_on(model: HookedModel) -> object:
    """What tells the hooks on a model apart: the numbers that torch gives them, by the module that bears them."""
    roots = [root for root in (model, getattr(model, "original_model", None)) if root is not None]
    modules = {id(module): module for root in roots for module in root.modules()}
    held = ((key, tuple(module._forward_pre_hooks), tuple(module._forward_hooks)) for key, module in modules.items())
    return tuple(one for one in held if one[1] or one[2])


def _with_states(model: HookedModel, layer: int, tokens: Tensor, states: Tensor) -> Tensor:
    return forward_pass(model, tokens, {point_name("resid_pre", layer): lambda t: states.view_as(t)})


@torch.no_grad()
def _proved(model: HookedModel, layer: int, tokens: Tensor, states: Tensor) -> Form | None:
    whole = _with_states(model, layer, tokens, states)
    try:
        # What the blocks below left lying for those above would be right by chance: it is of other sequences now.
        forward_pass(model, tokens.roll(1, 1).expand(3, -1), {})
        form = form_of_answers(model)
        with _begun(model, layer, form):
            return form if torch.equal(_with_states(model, layer, tokens, states), whole) else None
    except CANNOT as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


@contextmanager
def _begun(model: HookedModel, layer: int, form: Form | None) -> Iterator[None]:
    """Passes in which the blocks before `layer` answer what enters them."""
    if form is None:
        yield
        return

    def answer(*args: Any, **kwargs: Any) -> object:
        return form(args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["resid_pre"])

    below = [vars(block) for block in list(model.blocks)[:layer]]
    own = [held.get("forward") for held in below]
    try:
        for held in below:
            held["forward"] = answer
        yield
    finally:
        for held, forward in zip(below, own, strict=True):
            held.pop("forward", None)
            if forward is not None:
                held["forward"] = forward


class Prefixes:
    """Keys and values of whole sequences, from whose first tokens passes over the rest go on.

    `logits`: of the pass that made them.
    """

    def __init__(self, model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> None:
        self.model, self.tokens = model, tokens
        self.logits, self._past = filled_past(model, tokens)

    @staticmethod
    def can(model: HookedModel) -> bool:
        """Whether the model may take a cache of ours, and computes finely enough for a wrong or unused one to be found out."""
        fine = next(model.parameters()).dtype in (torch.float32, torch.float64)
        return fine and kind_of(model) == "bridge" and hf_config(model) is not None

    def go_on(self, rows: Int[Tensor, " copies"], first: int) -> Float[Tensor, "copies rest vocab"]:
        """Logits of the tokens from place `first` (at least 1) on, of copies of the sequences `rows`."""
        cache = cache_from(self._past, rows, first)
        return self.model(self.tokens[rows, first:], return_type="logits", past_key_values=cache, use_cache=True)
