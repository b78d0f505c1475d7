"""What the package needs of a model: the part of `TransformerBridge` and `HookedTransformer` that it touches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    # Importing transformers takes seconds: names for the type checker only.
    PretrainedConfig = PreTrainedModel = PreTrainedTokenizerBase = object


class Encoded(TypedDict, total=False):
    """What a tokenizer makes of one text."""

    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]


class AddedToken(Protocol):
    """A token that stands beside the vocabulary."""

    special: bool


class Tokenizer(Protocol):
    """What the package needs of a tokenizer of transformers."""

    is_fast: bool
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, AddedToken]

    def __call__(self, text: str, **options: object) -> Encoded:
        """Token ids of a text, and what else the options ask for."""

    def __len__(self) -> int:
        """Tokens that it knows."""

    def decode(self, token_ids: Sequence[int], **options: object) -> str:
        """The text of token ids."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """How the vocabulary spells a token."""


@runtime_checkable
class StateCache(Protocol):
    """What `run_with_cache` returns second, an `ActivationCache`, or a dict: hook names -> what was seen there."""

    def keys(self) -> Iterable[str]:
        """Names of hook points; those of gradients end in `_grad`."""

    def __getitem__(self, name: str, /) -> object:
        """A tensor or an array, as whoever reads it checks."""


@runtime_checkable
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
    device: str | None


class HookedModel(Protocol):
    """A language model of TransformerLens: a `TransformerBridge` (4.x) or a `HookedTransformer` (3.9).

    Neither class is imported to be named: each exists in one of the two versions only. What a model must be beyond these members,
    such as a decoder with attention in every block, `basin_lens.model.check_model` says in words.
    """

    training: bool
    tokenizer: Tokenizer | None

    @property
    def cfg(self) -> ModelSettings:
        """Sizes and rules."""

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

    @property
    def generate(self) -> Callable[..., object]:
        """Continues token ids; what it gives depends on its options."""

    @property
    def run_with_cache(self) -> Callable[..., tuple[Tensor, StateCache]]:
        """One forward pass over texts or token ids, and what its hook points saw."""

    @property
    def to_tokens(self) -> Callable[..., Tensor]:
        """Token ids of texts."""

    @property
    def hooks(self) -> Callable[..., AbstractContextManager[object]]:
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
