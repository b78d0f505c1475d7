"""A user's own `run_with_cache` -> the fields of a capture."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from basin_lens.capture import caches
from basin_lens.capture.fields import CaptureFields
from basin_lens.capture.planning import Mask, named_documents, row_fields
from basin_lens.model import HookedModel, StateCache, check_lengths, check_model
from basin_lens.texts import Passage, read_passages
from basin_lens.texts.passages import numbered_documents
from basin_lens.texts.tokens import from_token_ids, refuse_padding
from basin_lens.values import document, labels_of_all


def cache_fields(
    model: HookedModel,
    tokens: Tensor,
    cache: StateCache,
    *,
    attention_mask: Mask,
    docs: Sequence[object] | None,
    labels: Sequence[Mapping[str, object]] | None,
    texts: Sequence[str | Passage] | str | None,
) -> CaptureFields:
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
    needed = sorted({border for layer in layers for border in (layer, layer + 1)})
    dtype = caches.stored_type(borders[border] for border in needed)
    settings = {"bos": None, "source": "cache", "max_length": shape[1], "dtype": dtype}
    fields = row_fields(model, sequences, passages, layers, settings)
    _put_given(fields, docs, labels)
    check_lengths(model, [len(s.tokens) for s in sequences])
    # Indexing by the mask copies: nothing of the user's cache stays referenced.
    fields["_states"] = {border: borders[border].detach()[valid.to(borders[border].device)].float().cpu() for border in needed}
    entry = borders[0] if 0 in borders and 0 not in layers else None
    fields["_readings"] = _readings(model, cache, layers, valid, entry)
    return fields


def _put_given(fields: CaptureFields, docs: Sequence[object] | None, labels: Sequence[Mapping[str, object]] | None) -> None:
    """Put the documents and labels that the user gave, one for each sequence, in place of the fields' own."""
    count = len(fields["sequences"])
    of_each, labels_of_each = caches.one_each(docs, count, "document"), caches.one_each(labels, count, "dict of labels")
    if of_each is not None:
        given = [document(doc) for doc in of_each]
        fields["docs"] = numbered_documents("sequence", given)
        others = {name: fact for name, fact in fields["settings"].items() if name != "named_documents"}
        fields["settings"] = {**others, **named_documents(doc for doc in given if doc is not None)}
    if labels_of_each is not None:
        fields["labels"] = labels_of_all(labels_of_each)


def _readings(
    model: HookedModel, cache: StateCache, layers: Iterable[int], valid: Bool[Tensor, "batch pos"], entry: Tensor | None
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
