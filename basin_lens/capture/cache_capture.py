"""A user's own `run_with_cache` -> the fields of a capture."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from basin_lens.capture import caches
from basin_lens.capture.planning import row_fields
from basin_lens.model import HookedModel, check_lengths, check_model
from basin_lens.texts import Passage, TokenSequence, read_passages
from basin_lens.texts.tokens import from_token_ids, refuse_padding
from basin_lens.values import document, labels_of_all


def cache_fields(
    model: HookedModel,
    tokens: Any,
    cache: Any,
    *,
    attention_mask: Any,
    docs: Sequence[Any] | None,
    labels: Sequence[Mapping[str, Any]] | None,
    texts: Sequence[str | Passage] | str | None,
) -> dict[str, Any]:
    """The fields of a `Capture` of a user's cache, as copies; arguments and errors as for `Capture.from_cache`."""
    check_model(model)
    tokens = caches.as_batch(tokens)
    shape = (int(tokens.shape[0]), int(tokens.shape[1]))
    caches.check_is_cache(cache)
    valid = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else caches.real_tokens(attention_mask, shape)
    borders, missing = caches.borders_in(model, cache, shape)
    layers = caches.layers_between(model, borders, missing)
    sequences = from_token_ids(model, tokens, valid)
    if attention_mask is None:
        refuse_padding(model, [s.tokens for s in sequences])
    passages = None
    if texts is not None:
        passages = read_passages(texts)
        sequences = caches.align(model, passages, sequences)
    given = _given_facts(sequences, docs, labels)
    needed = sorted({border for layer in layers for border in (layer, layer + 1)})
    dtype = caches.stored_type(borders[border] for border in needed)
    rows = row_fields(model, sequences, passages)
    check_lengths(model, [len(s.tokens) for s in sequences])
    # Indexing by the mask copies: nothing of the user's cache stays referenced.
    states = {border: borders[border].detach()[valid.to(borders[border].device)].float().cpu() for border in needed}
    entry = borders[0] if 0 in borders and 0 not in layers else None
    return {
        **rows,
        **given,
        "layers": layers,
        "settings": {"bos": None, "source": "cache", "max_length": shape[1], "dtype": dtype},
        "_states": states,
        "_readings": _readings(model, cache, layers, valid, entry),
    }


def _given_facts(
    sequences: Sequence[TokenSequence], docs: Sequence[Any] | None, labels: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Documents and labels that the user gave, one for each sequence."""
    docs = caches.one_each(docs, len(sequences), "document")
    labels = caches.one_each(labels, len(sequences), "dict of labels")
    given: dict[str, Any] = {}
    if docs is not None:
        given["docs"] = [document(doc) or f"sequence-{i}" for i, doc in enumerate(docs)]
    if labels is not None:
        given["labels"] = labels_of_all(labels)
    return given


def _readings(
    model: HookedModel, cache: Any, layers: Iterable[int], valid: Bool[Tensor, "batch pos"], entry: Tensor | None
) -> dict[str, Tensor]:
    """Patterns and gradients of the cache by name and layer; and what enters block 0, in a cache without a whole layer 0."""
    found: dict[str, Tensor] = {}
    for name, value in caches.other_readings(model, cache, (valid.shape[0], valid.shape[1]), layers).items():
        found[name] = value.detach().float().cpu().clone()
        caches.refuse_endless(name, found[name], valid)
    if entry is not None:
        found[caches.ENTRY] = entry.detach().float().cpu().clone()
    if found:
        found["valid"] = valid
    return found
