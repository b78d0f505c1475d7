"""What the package needs of a model: the part of `TransformerBridge` and `HookedTransformer` that it touches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ModelSettings(Protocol):
    """A model's `cfg`: sizes and rules. What only some models have is read with `getattr`."""

    n_layers: int
    d_model: int
    d_head: int
    n_heads: int
    n_ctx: int
    d_vocab: int
    model_name: str
    tokenizer_name: str | None
    seed: int | None
    init_weights: bool
    dtype: torch.dtype
    device: torch.device | str | None


class HookedModel(Protocol):
    """A language model of TransformerLens: a `TransformerBridge` (4.x) or a `HookedTransformer` (3.9).

    Neither class is imported to be named: each exists in one of the two versions only. What a model must be beyond these members, such as a
    decoder with attention in every block, `basin_lens.model.check_model` says in words.
    """

    cfg: ModelSettings
    training: bool
    tokenizer: Any  # any tokenizer of transformers, or None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        """Every hook point by its full name."""

    @property
    def embed(self) -> nn.Module:
        """From token ids to vectors."""

    @property
    def ln_final(self) -> nn.Module:
        """The normalization before the unembedding."""

    def __call__(self, tokens: Tensor, **options: object) -> Tensor:
        """One forward pass."""

    def generate(self, tokens: Tensor, **options: object) -> Tensor:
        """Token ids, continued."""

    def run_with_cache(self, tokens: Tensor, **options: object) -> tuple[Tensor, Any]:
        """One forward pass, and what its hook points saw."""

    def to_tokens(self, text: str | list[str], **options: object) -> Tensor:
        """Token ids of texts."""

    def hooks(self, fwd_hooks: list[tuple[str, Any]], **options: object) -> AbstractContextManager[object]:
        """Hooks that last as long as a `with` block."""

    def reset_hooks(self) -> None:
        """Take every hook away."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of `torch.nn.Module`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of `torch.nn.Module`."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As of `torch.nn.Module`."""

    def modules(self) -> Iterator[nn.Module]:
        """As of `torch.nn.Module`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As of `torch.nn.Module`."""

    def state_dict(self) -> dict[str, Tensor]:
        """As of `torch.nn.Module`."""

    def eval(self) -> "HookedModel":
        """As of `torch.nn.Module`."""

    def train(self, mode: bool = True) -> "HookedModel":
        """As of `torch.nn.Module`."""

    def to(self, place: torch.device | torch.dtype | str) -> "HookedModel":
        """As of `torch.nn.Module`."""

    def zero_grad(self) -> None:
        """As of `torch.nn.Module`."""
