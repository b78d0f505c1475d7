"""Texts or token ids -> the rows of a capture, before the model has read them."""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from basin_lens.capture.batches import check_layers
from basin_lens.capture.fields import CaptureFields
from basin_lens.model import HookedModel, check_lengths, check_model, provenance, uses_bos
from basin_lens.texts import Passage, Texts, read_passages
from basin_lens.texts.passages import NumberedDocument, is_numbered
from basin_lens.texts.tokens import TokenSequence, given_ids, longest_sequence, token_strings, tokenize
from basin_lens.values import Facts, Layers, Whole

# What a caller may give as attention_mask: 1 for real tokens, 0 for padding.
Mask = Tensor | np.ndarray | Sequence[object] | None


def planned_fields(
    model: HookedModel, data: Texts, *, layers: Layers, max_length: Whole, prepend_bos: bool | None, attention_mask: Mask
) -> CaptureFields:
    """The fields of a `Capture` of texts or token ids that the model has not read; see `Capture.plan`.

    Raises:
        ModelError, TextError, CaptureError: what cannot be read, before any pass.
    """
    check_model(model)
    chosen = check_layers(model, layers)
    passages, found = None, given_ids(model, data, attention_mask)
    if found is None:
        passages = read_passages(data)
        found = tokenize(model, passages, max_length=max_length, prepend_bos=prepend_bos)
    settings = {
        "max_length": longest_sequence(model, max_length),
        "bos": uses_bos(model, prepend_bos) if passages is not None else None,
        "source": "tokens" if passages is None else "texts",
    }
    check_lengths(model, [len(s.tokens) for s in found])
    return row_fields(model, found, passages, chosen, settings)


def row_fields(
    model: HookedModel,
    sequences: list[TokenSequence],
    passages: list[Passage] | None,
    layers: tuple[int, ...],
    settings: Facts,
) -> CaptureFields:
    """The fields of a `Capture` that say whose tokens its rows are: documents and labels are those of the passages."""
    return {
        "sequences": sequences,
        "passages": passages,
        "docs": [f"sequence-{i}" if passages is None else str(passages[s.passage].doc) for i, s in enumerate(sequences)],
        "labels": [{} if passages is None else dict(passages[s.passage].labels) for s in sequences],
        "strings": token_strings(model, (token for s in sequences for token in s.tokens)),
        "layers": layers,
        "model": provenance(model),
        "settings": {**settings, **named_documents(_given(passages or ()))},
    }


def _given(passages: Iterable[Passage]) -> list[str]:
    """The documents that were given."""
    return [str(passage.doc) for passage in passages if not isinstance(passage.doc, NumberedDocument)]


def named_documents(given: Iterable[str]) -> Facts:
    """What a capture's settings say of documents that were given, and are called as if they were not."""
    named = sorted({doc for doc in given if is_numbered(doc)})
    return {"named_documents": named} if named else {}
