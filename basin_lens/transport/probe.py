"""What the blocks of a model are called with, and which route that allows."""

import warnings
from typing import TypeGuard

import torch
from torch import Tensor

from basin_lens.errors import CompileWarning
from basin_lens.model import BlockCall, HookedModel, device_of, is_cache_slot, kind_of, record_calls


class Probe:
    """What the blocks of a model are called with, recorded once per shape of batch, and the route that this allows.

    Args:
        model: a hooked model.
        length: tokens of the longest sequence.
        compiles: blocks are to be compiled where that is exact.
    """

    def __init__(self, model: HookedModel, length: int, *, compiles: bool = False) -> None:
        self.model, self.length, self.compiles = model, length, compiles
        self._said = False
        self._recorded: dict[tuple[int, int], list[BlockCall]] = {}

    def call(self, layer: int, copies: int = 1, length: int | None = None) -> BlockCall:
        """Arguments of a block for `copies` sequences of `length` tokens (None: the longest).

        They are recorded from a real pass of that shape, unless they broadcast over the batch: some models fold heads into it.
        """
        length = length or self.length
        single = self._calls(1, length)[layer]
        if copies == 1 or not (why_not_packed(single, length) or kind_of(self.model) == "hooked"):
            return single.widened(copies) if copies > 1 else single
        return self._calls(copies, length)[layer]

    def reason(self, layer: int) -> str:
        """Why block `layer` cannot take route R2, as far as its arguments show; empty if they allow it. See `prove`."""
        call = self._calls(1, self.length)[layer]
        return why_not_padded(call) if kind_of(self.model) == "hooked" else why_not_packed(call, self.length)

    def say_uncompiled(self, layer: int, why: str) -> None:
        """Warn that a block is not compiled although that was asked for: of the first one."""
        if not self._said:
            self._said = True
            said = f"block {layer} runs uncompiled: {why}. The numbers are right; provenance says it of each layer."
            warnings.warn(said, CompileWarning, stacklevel=2)

    def _calls(self, copies: int, length: int) -> list[BlockCall]:
        if (copies, length) not in self._recorded:
            tokens = torch.zeros(copies, length, dtype=torch.int64, device=device_of(self.model))
            self._recorded[copies, length] = record_calls(self.model, tokens)
        return self._recorded[copies, length]


def why_not_packed(call: BlockCall, length: int) -> str:
    """Why a block's arguments do not allow the packed route; empty if they do."""
    caches = sum(is_cache_slot(value) for value in call.leaves())
    if caches != 1:
        return f"the block takes {caches} key/value caches, not one"
    if not any(is_mask(value, length) for value in call.leaves()):
        return "the block gets no 4-D attention mask"
    for value in call.leaves():
        tensors = value if isinstance(value, tuple | list) else [value]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not (is_mask(tensor, length) or _is_per_position(tensor, length)):
                return f"the block takes a tensor of shape {tuple(tensor.shape)} that is neither mask nor per position"
    return ""


def why_not_padded(call: BlockCall) -> str:
    """Why a HookedTransformer block's arguments do not allow the padded route; empty if they do."""
    if not {"past_kv_cache_entry", "attention_mask"} <= set(call.kwargs):
        return "the block takes no key/value cache and attention mask"
    others = [name for name, value in call.kwargs.items() if isinstance(value, Tensor) and name != "attention_mask"]
    if others:
        return f"the block takes the tensor {others[0]}, which belongs to whole sequences"
    return ""


def is_mask(value: object, length: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == (1, 1, length, length)


def _is_per_position(value: Tensor, length: int) -> bool:
    """Position ids `[1, pos]`, or one rotary table `[1, pos, d]`."""
    return value.ndim in (2, 3) and tuple(value.shape[:2]) == (1, length)
