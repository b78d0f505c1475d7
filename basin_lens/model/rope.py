"""Rotary tables that depend on the longest text of a batch: where the batch mates of a text would change its numbers."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from basin_lens.errors import CaptureError
from basin_lens.model.identity import full_name
from basin_lens.model.protocol import HookedModel


@dataclass(frozen=True)
class LengthRule:
    """A rotary table that changes with length.

    `kind` "longrope" has one table up to `length` tokens and another beyond; "dynamic" has a table of its own for every length
    beyond, and keeps it for later texts.
    """

    kind: str
    length: int


def length_rule(model: HookedModel) -> LengthRule | None:
    """The rule by which the model's rotary tables depend on the longest text of a batch; None if they do not."""
    found = [LengthRule(kind, length) for module in _rotary_modules(model) for kind, length in _rules(module)]
    return min(found, key=lambda rule: (rule.kind != "dynamic", rule.length), default=None)


def check_lengths(model: HookedModel, lengths: list[int]) -> None:
    """Refuse sequences whose states would depend on what else is, or was, read.

    Raises:
        CaptureError: a sequence beyond the original context of a model with a dynamic rotary table.
    """
    rule = length_rule(model)
    if rule is not None and rule.kind == "dynamic" and max(lengths) > rule.length:
        raise CaptureError(
            f"expected sequences of at most {rule.length} tokens with {full_name(model)}, whose rotary table is dynamic (rope_type "
            f'"dynamic"), got {max(lengths)}: beyond that, a text\'s numbers depend on the longest text of its batch and on what '
            f"was read before. Cut the texts (max_length={rule.length})."
        )


def one_side(model: HookedModel, lengths: list[int]) -> int | None:
    """The length at which batches must be parted: None, unless a longrope model's boundary lies between the sequences' lengths."""
    if min(lengths) == max(lengths):  # nothing lies between: the model need not be walked
        return None
    rule = length_rule(model)
    if rule is None or rule.kind != "longrope" or not min(lengths) <= rule.length < max(lengths):
        return None
    return rule.length


def forget_lengths(model: HookedModel) -> None:
    """Put back dynamic rotary tables that a longer text, read before, has left behind."""
    for module in _rotary_modules(model):
        for prefix, _ in _kinds(module, "dynamic"):
            own = getattr(module, f"{prefix}original_inv_freq", None)
            grown = getattr(module, f"{prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", 0))
            if own is not None and int(grown) > int(module.original_max_seq_len):
                module.register_buffer(f"{prefix}inv_freq", own.to(getattr(module, f"{prefix}inv_freq").device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotary_modules(model: HookedModel) -> list[Any]:
    inner = getattr(model, "original_model", None)
    modules = [] if inner is None else [m for m in inner.modules() if isinstance(getattr(m, "__dict__", None), dict)]
    return [m for m in modules if isinstance(m, nn.Module) and "rope_type" in m.__dict__]


def _kinds(module: Any, wanted: str) -> list[tuple[str, str]]:
    """Prefix and kind of the module's tables (one, or one for each type of layer) of a kind."""
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    return [(f"{layer}_" if layer else "", str(kind)) for layer, kind in kinds.items() if wanted in str(kind)]


def _rules(module: Any) -> list[tuple[str, int]]:
    rules = [("dynamic", int(module.original_max_seq_len)) for _ in _kinds(module, "dynamic")]
    for prefix, _ in _kinds(module, "longrope"):
        settings = getattr(module.config, "rope_parameters", None) or getattr(module.config, "rope_scaling", None) or {}
        settings = settings.get(prefix.removesuffix("_"), settings) if prefix else settings
        length = settings.get("original_max_position_embeddings") or getattr(
            module.config, "original_max_position_embeddings", module.original_max_seq_len
        )
        rules.append(("longrope", int(length)))
    return rules
