"""The record of one pass: token rows and residual states."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from basin_lens.capture.batches import TokenMeasure
from basin_lens.capture.cache_capture import cache_fields
from basin_lens.capture.planning import Mask, planned_fields
from basin_lens.capture.reading import read_states
from basin_lens.capture.saving import save_capture
from basin_lens.capture.states import CapturedStates
from basin_lens.capture.store import check_shards, read_capture
from basin_lens.model import HookedModel, StateCache
from basin_lens.texts import Passage, Texts
from basin_lens.values import Layers, Whole, card


@dataclass(repr=False)
class Capture(CapturedStates):
    """Token rows and residual states of some texts under one model. It owns its tensors and keeps no model or cache alive.

    Rows are the real tokens of all sequences, one after the other, position 0 included.

    Attributes:
        sequences: token ids, passage and character offsets of each sequence.
        passages: the texts, or None if token ids were given.
        docs: document of each sequence.
        labels: labels of each sequence.
        layers: the layers L for which `resid_pre(L)` and `resid_post(L)` are there.
        model: fingerprint, name, sizes and weight processing of the model.
        columns: values of token analyzers by `analyzer.key`, then column, `[n_layers or 1, rows]`; NaN at layers never asked for.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[0], progress=False)
        >>> capture.resid_pre(0).shape == (capture.n_rows, 576)
        True
    """

    def __repr__(self) -> str:
        layers = f"layers {self.layers[0]} to {self.layers[-1]}" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        place = f", in {self._store}" if self._store is not None else ""
        return f"Capture({len(self.sequences)} sequences, {self.n_rows} tokens, {layers} of {self.model['name']}{place})"

    def _repr_html_(self) -> str:
        lengths = [len(sequence.tokens) for sequence in self.sequences]
        documents = {
            sequence.passage if self.passages is None else self.passages[sequence.passage].doc for sequence in self.sequences
        }
        return card(
            "Capture",
            {
                "model": self.model["name"],
                "layers": ", ".join(map(str, self.layers)),
                "texts": f"{len(lengths)} sequences of {len(documents)} documents, {min(lengths)} to {max(lengths)} tokens each, "
                f"{self.n_rows} in all",
                "the first begins": "".join(self.row_strings()[: min(16, lengths[0])]),
                "kept in": "memory" if self._store is None else str(self._store),
            },
        )

    @classmethod
    def from_texts(
        cls,
        model: HookedModel,
        data: Texts,
        *,
        layers: Layers = None,
        analyzers: Sequence[TokenMeasure] | None = None,
        max_length: Whole = 128,
        batch_size: Whole | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Mask = None,
        store: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> "Capture":
        """Run the model once over texts and keep the residual states around each of `layers`.

        Args:
            model: a `TransformerBridge` or `HookedTransformer`, in any state (train mode, frozen, other device).
            data: as for `analyze`, but no `Capture`.
            layers: block indices; None: all.
            analyzers: token analyzers to fill during the pass; None: none.
            max_length: longest sequence in tokens, BOS counted (the model's context if that is shorter); longer texts become
                several sequences.
            batch_size: sequences per pass; None: about 1,000 tokens.
            prepend_bos: None: the model's default.
            attention_mask: of token ids: 1 for real tokens, 0 for padding on either side, which is left out.
            store: a new folder to keep the states in instead of memory (safetensors, one file per batch).
            progress: show a progress bar.

        Raises:
            ModelError, TextError: see there.
            CaptureError: unknown layer, NaN or infinite states, a missing hook point.
            StoreError: the folder exists or cannot be written.
        """
        planned = cls.plan(
            model, data, layers=layers, max_length=max_length, prepend_bos=prepend_bos, attention_mask=attention_mask
        )
        return read_states(model, planned, analyzers, batch_size=batch_size, store=store, progress=progress)

    @classmethod
    def plan(
        cls,
        model: HookedModel,
        data: Texts,
        *,
        layers: Layers = None,
        max_length: Whole = 128,
        prepend_bos: bool | None = None,
        attention_mask: Mask = None,
    ) -> "Capture":
        """The rows of a capture, nothing read yet: enough to check a whole request before the model runs. See `read_states`.

        Arguments and errors as for `from_texts`.
        """
        fields = planned_fields(
            model, data, layers=layers, max_length=max_length, prepend_bos=prepend_bos, attention_mask=attention_mask
        )
        return cls(**fields)

    @classmethod
    @torch.inference_mode(False)
    def from_cache(
        cls,
        model: HookedModel,
        tokens: Tensor,
        cache: StateCache,
        *,
        attention_mask: Mask = None,
        docs: Sequence[object] | None = None,
        labels: Sequence[Mapping[str, object]] | None = None,
        texts: Sequence[str | Passage] | str | None = None,
    ) -> "Capture":
        """A capture from the user's own `run_with_cache`, without another pass.

        Reads the residual states, and attention patterns and gradients (`*_grad`) if the cache has them, as copies; logits are
        computed from the last state. All layers of which both `resid_pre` and `resid_post` can be found are available. Before
        anything is computed from a layer, all sequences are passed through its block once: states that are not the model's are
        refused there. So are states of other tokens, by what enters block 0, or by a pass up to the first state in a cache that
        does not hold it.

        Args:
            model: the model that made the cache.
            tokens: the token ids given to the model, `[batch, pos]` or `[pos]`.
            cache: an `ActivationCache` or a dict of tensors (or arrays) by hook name, with or without batch dimension, in any
                floating-point type: states in float16 or bfloat16 are held to that type's tolerance.
            attention_mask: 1 for real tokens, 0 for padding on either side (or an additive mask: 0 and -inf); None: all real, and
                ids that look padded are refused.
            docs: document of each sequence; None: a document each.
            labels: labels of each sequence.
            texts: the text of each sequence, to have character offsets in the table.

        Raises:
            CaptureError: no usable layer (the missing hook points are named), shapes that do not fit tokens or model, NaN.
            TextError: no token ids, or padding among them without a mask.
        """
        fields = cache_fields(model, tokens, cache, attention_mask=attention_mask, docs=docs, labels=labels, texts=texts)
        capture = cls(**fields)
        for border in sorted({border for layer in capture.layers for border in (layer, layer + 1)}):
            capture.refuse_nonfinite(torch.arange(capture.n_rows, device="cpu"), border, capture.border(border))
        return capture

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the capture to a new folder: safetensors and JSON, all of it or nothing.

        Raises:
            StoreError: the folder exists or cannot be written, or states on disk are not as they were written. CaptureError:
                nothing read yet.
        """
        save_capture(self, path)

    def check_store(self) -> None:
        """Prove all that is kept on disk, which else happens file by file when it is first read.

        Raises:
            StoreError: a file that is missing or was changed.
        """
        if self._store is not None:
            check_shards(self._store, self._shards)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Capture":
        """Read a capture that `save` or `store=` wrote; states stay on disk until asked for.

        All but the states is checked against its digest here, each file of states when it is first read (a second for 1 to 2 GB).

        Raises:
            StoreError: no capture there, one that is not as it was written, or one of an earlier version.
        """
        return cls(**read_capture(Path(path).absolute()))


# Where neighbors come from: another capture, the passages that the package brings, or None, the texts themselves.
Bank = Capture | Literal["reference"] | None
