"""The record of one pass: token rows and residual states."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens.capture import caches
from basin_lens.capture.batches import TokenMeasure, check_layers, check_points, layers_of, run_batch, token_batches
from basin_lens.capture.foreign import check_cache
from basin_lens.capture.layout import TokenRows
from basin_lens.capture.readings import holds, measure_readings
from basin_lens.capture.store import (
    check_shards,
    copy_borders,
    read_border,
    read_capture,
    write_borders,
    write_record,
)
from basin_lens.errors import CaptureError
from basin_lens.files import new_folder
from basin_lens.model import (
    check_lengths,
    check_model,
    fingerprint,
    full_name,
    full_precision,
    one_side,
    provenance,
    uses_bos,
    width,
)
from basin_lens.texts import Passage, read_passages
from basin_lens.texts.tokens import (
    TokenSequence,
    from_token_ids,
    given_ids,
    longest_sequence,
    refuse_padding,
    token_strings,
    tokenize,
)
from basin_lens.values import Whole, document, labels_of_all, whole_numbers


@dataclass(repr=False)
class Capture(TokenRows):
    """Token rows and residual states of some texts under one model. It owns its tensors and keeps no model or cache alive.

    Rows are the real tokens of all sequences, one after the other, position 0 included.

    Attributes:
        sequences: token ids, passage and character offsets of each sequence.
        passages: the texts, or None if token ids were given.
        docs: document of each sequence.
        labels: labels of each sequence.
        layers: the layers L for which `resid_pre(L)` and `resid_post(L)` are there.
        model: fingerprint, name, sizes and weight processing of the model.
        columns: values of token analyzers by `analyzer.key`, then column, `[n_layers or 1, rows]`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[0], progress=False)
        >>> capture.resid_pre(0).shape == (capture.n_rows, 576)
        True
    """

    layers: tuple[int, ...]
    model: dict[str, Any]
    settings: dict[str, Any]
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _states: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _readings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _store: Path | None = None
    _shards: dict[str, Any] = field(default_factory=dict, repr=False)  # files of the store, each with its digest
    _checked: set[int] = field(default_factory=set, repr=False)

    def __repr__(self) -> str:
        layers = f"layers {self.layers[0]} to {self.layers[-1]}" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        place = f", in {self._store}" if self._store is not None else ""
        return f"Capture({len(self.sequences)} sequences, {self.n_rows} tokens, {layers} of {self.model['name']}{place})"

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        model: Any,
        data: Any,
        *,
        layers: Any = None,
        analyzers: Sequence[TokenMeasure] | None = None,
        max_length: Whole = 128,
        batch_size: Whole | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Any = None,
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
        rows: Any = {"layers": layers, "max_length": max_length, "prepend_bos": prepend_bos, "attention_mask": attention_mask}
        return cls.plan(model, data, **rows).read(model, analyzers, batch_size=batch_size, store=store, progress=progress)

    @classmethod
    def plan(
        cls,
        model: Any,
        data: Any,
        *,
        layers: Any = None,
        max_length: Whole = 128,
        prepend_bos: bool | None = None,
        attention_mask: Any = None,
    ) -> "Capture":
        """The rows of a capture, nothing read yet: enough to check a whole request before the model runs. See `read`."""
        check_model(model)
        chosen = check_layers(model, layers)
        passages, found = None, given_ids(model, data, attention_mask)
        if found is None:
            passages = read_passages(data)
            found = tokenize(model, passages, max_length=max_length, prepend_bos=prepend_bos)
        bos = uses_bos(model, prepend_bos) if passages is not None else None
        longest = longest_sequence(model, max_length)
        settings = {"max_length": longest, "bos": bos, "source": "tokens" if passages is None else "texts"}
        planned = cls._empty(model, found, passages, chosen, settings)
        check_lengths(model, planned.lengths.tolist())
        return planned

    def read(
        self,
        model: Any,
        analyzers: Sequence[TokenMeasure] | None = None,
        *,
        batch_size: Whole | None = None,
        store: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> "Capture":
        """Run the model over the planned rows, once; interrupted, it is a plan as before. Arguments and errors as for `from_texts`."""
        if self.is_read:
            raise CaptureError("expected a capture that is only planned, got one that was read. Plan another: Capture.plan(...).")
        token_analyzers = list(analyzers or [])
        if store is None:
            self._fill(model, token_analyzers, batch_size, progress, keep_states=True)
            return self
        place = Path(store).absolute()  # also from another working folder
        try:
            with new_folder(place) as folder:
                self._store = folder
                self._fill(model, token_analyzers, batch_size, progress, keep_states=True)
                self._write_record(folder, self._shards)
        except BaseException:
            self._store, self._shards = None, {}
            raise
        self._store = place
        return self

    @classmethod
    @torch.inference_mode(False)
    def from_cache(
        cls,
        model: Any,
        tokens: Any,
        cache: Any,
        *,
        attention_mask: Any = None,
        docs: Sequence[Any] | None = None,
        labels: Sequence[Mapping[str, Any]] | None = None,
        texts: Sequence[str | Passage] | str | None = None,
    ) -> "Capture":
        """A capture from the user's own `run_with_cache`, without another pass.

        Reads the residual states, and attention patterns and gradients (`*_grad`) if the cache has them, as copies; logits are computed
        from the last state. All layers of which both `resid_pre` and `resid_post` can be found are available. Before anything is
        computed from a layer, all sequences are passed through its block once: states that are not the model's are refused there. So are
        states of other tokens, by what enters block 0, or by a pass up to the first state in a cache that does not hold it.

        Args:
            model: the model that made the cache.
            tokens: the token ids given to the model, `[batch, pos]` or `[pos]`.
            cache: an `ActivationCache` or a dict of tensors (or arrays) by hook name, with or without batch dimension, in any
                floating-point type: states in float16 or bfloat16 are held to that type's tolerance.
            attention_mask: 1 for real tokens, 0 for padding on either side (or an additive mask: 0 and -inf); None: all real, and ids that
                look padded are refused.
            docs: document of each sequence; None: a document each.
            labels: labels of each sequence.
            texts: the text of each sequence, to have character offsets in the table.

        Raises:
            CaptureError: no usable layer (the missing hook points are named), shapes that do not fit tokens or model, NaN.
            TextError: no token ids, or padding among them without a mask.
        """
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
        docs, labels = caches.one_each(docs, len(sequences), "document"), caches.one_each(labels, len(sequences), "dict of labels")
        needed = sorted({border for layer in layers for border in (layer, layer + 1)})
        dtype = caches.stored_type(borders[border] for border in needed)
        settings = {"bos": None, "source": "cache", "max_length": shape[1], "dtype": dtype}
        capture = cls._empty(model, sequences, passages, layers, settings)
        check_lengths(model, capture.lengths.tolist())
        if docs is not None:
            capture.docs = [document(doc) or f"sequence-{i}" for i, doc in enumerate(docs)]
        if labels is not None:
            capture.labels = labels_of_all(labels)
        for border in needed:
            # Indexing by the mask copies: nothing of the user's cache stays referenced.
            capture._states[border] = borders[border].detach()[valid.to(borders[border].device)].float().cpu()
        for name, value in caches.other_readings(model, cache, shape, layers).items():
            capture._readings[name] = value.detach().float().cpu().clone()
            caches.refuse_endless(name, capture._readings[name], valid)
        if 0 in borders and 0 not in layers:
            capture._readings[caches.ENTRY] = borders[0].detach().float().cpu().clone()
        if capture._readings:
            capture._readings["valid"] = valid
        for border, states in capture._states.items():
            capture._refuse_nonfinite(torch.arange(capture.n_rows, device="cpu"), border, states)
        return capture

    @classmethod
    def _empty(
        cls,
        model: Any,
        sequences: list[TokenSequence],
        passages: list[Passage] | None,
        layers: tuple[int, ...],
        settings: dict[str, Any],
    ) -> "Capture":
        docs = [f"sequence-{i}" if passages is None else str(passages[s.passage].doc) for i, s in enumerate(sequences)]
        labels = [{} if passages is None else dict(passages[s.passage].labels) for s in sequences]
        strings = token_strings(model, (token for s in sequences for token in s.tokens))
        return cls(sequences, passages, docs, labels, strings, layers, provenance(model), settings)

    @property
    def is_read(self) -> bool:
        """Whether the model has read the rows; one from `plan` alone holds no states yet."""
        return bool(self._states) or self._store is not None

    # -- states -------------------------------------------------------------------------------------------------------

    @whole_numbers(CaptureError)
    def resid_pre(self, layer: int) -> Float[Tensor, "rows d"]:
        """States entering block `layer`, float32, on the CPU, in row order."""
        return self._border(layer)

    @whole_numbers(CaptureError)
    def resid_post(self, layer: int) -> Float[Tensor, "rows d"]:
        """States leaving block `layer`, float32, on the CPU, in row order."""
        return self._border(layer + 1)

    def _border(self, border: int) -> Tensor:
        if self._store is not None:
            if {border, border - 1} & set(self.layers):
                return read_border(self._store, self._shards, border, (self.n_rows, self.model["width"]))
        elif border in self._states:
            return self._states[border]
        raise CaptureError(
            f"expected a captured layer, got the state entering block {border}; this capture holds layers {list(self.layers)}. "
            "Capture again with layers=[...]."
        )

    def check_model_is(self, model: Any) -> None:
        """Refuse a model other than the one that made this capture.

        Raises:
            CaptureError: the fingerprints differ (other weights, settings or weight processing).
        """
        if fingerprint(model) != self.model["fingerprint"]:
            raise CaptureError(
                f"expected the model that made this capture ({self.model['name']}, {self.model['fingerprint'][:8]}), got "
                f"{full_name(model)} ({fingerprint(model)[:8]}). Weights, settings or weight processing differ: "
                "capture again with this model."
            )

    # -- token analyzers ----------------------------------------------------------------------------------------------

    def measure(self, model: Any, analyzers: Sequence[TokenMeasure], *, progress: bool = True) -> list[str]:
        """Fill the columns of token analyzers that are not there yet: from what was read, else with one more pass.

        Returns:
            keys of the analyzers for which the model ran again.

        Raises:
            CaptureError: a hook point or a gradient that is not to be had.
            TransportError: states of a user's cache that are not the model's.
        """
        open_ = [a for a in analyzers if a.key not in self.columns]
        readable = [a for a in open_ if self._readable(a)]
        again = [a for a in open_ if a not in readable]
        if again and not self.settings.get("states_of_model", True):
            made = self.settings["controls"][-1]["name"]
            raise CaptureError(
                f"expected analyzers of states alone: {made} are not the model's own; got {again[0].key}. Leave it out."
            )
        check_points(model, self.layers, again)
        ends = [self.model["layers"] - 1] if any("logits" in a.needs for a in readable) else []
        check_cache(model, self, {*ends, *(layer for a in readable for layer in layers_of(a, self.layers))})
        with full_precision(), self._all_or_none(readable):
            for analyzer in readable:
                measure_readings(model, self, analyzer)
        if again:
            self._fill(model, again, None, progress, keep_states=False)
        return [analyzer.key for analyzer in again]

    def _readable(self, analyzer: TokenMeasure) -> bool:
        looks = layers_of(analyzer, self.layers)
        if analyzer.needs <= {"resid_pre", "resid_post"} and analyzer.target is None:
            return set(looks) <= set(self.layers)
        if self.settings["source"] != "cache" or analyzer.target not in (None, "cache") or not set(looks) <= set(self.layers):
            return False
        return all(holds(self, need, layer) for layer in looks for need in analyzer.needs)

    def _keep(self, rows: Tensor, valid: Tensor, analyzer: TokenMeasure, layer: int, values: Mapping[str, Tensor]) -> None:
        columns = self.columns.setdefault(analyzer.key, {})
        for name, value in values.items():
            if value.ndim == 1:  # one number per sequence: repeated on its tokens
                value = value[:, None].expand(valid.shape)
            if value.shape != valid.shape:
                raise CaptureError(
                    f"expected {analyzer.key} to give [batch, pos] or [batch] for {name!r}, got {tuple(value.shape)}."
                )
            height = self.model["layers"] if analyzer.per_layer else 1
            column = columns.setdefault(name, torch.full((height, self.n_rows), torch.nan, dtype=torch.float32, device="cpu"))
            column[layer if analyzer.per_layer else 0, rows] = value.detach()[valid.to(value.device)].float().cpu()

    @contextmanager
    def _all_or_none(self, analyzers: Sequence[TokenMeasure]) -> Iterator[None]:
        """Columns that were only begun when an error or an interruption came must not pass for filled ones."""
        begun = {a.key for a in analyzers} - self.columns.keys()
        try:
            yield
        except BaseException:
            for key in begun:
                self.columns.pop(key, None)
            raise

    # -- the pass -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is kept must not be an inference tensor, whatever mode the caller is in
    def _fill(
        self, model: Any, analyzers: Sequence[TokenMeasure], batch_size: Whole | None, progress: bool, *, keep_states: bool
    ) -> None:
        """Run the model over all sequences; keep states and fill analyzers."""
        check_points(model, self.layers, analyzers)
        batches = list(token_batches(self, batch_size, one_side(model, self.lengths.tolist())))
        borders = sorted({border for layer in self.layers for border in (layer, layer + 1)}) if keep_states else []
        states: dict[int, Tensor] = {}
        if self._store is None:
            shape = self.n_rows, width(model)
            states = {border: torch.full(shape, torch.nan, dtype=torch.float32, device="cpu") for border in borders}
        with (
            self._all_or_none(analyzers),
            tqdm(total=self.n_rows, desc="reading the model", unit="token", disable=not progress) as bar,
        ):
            for index, (rows, tokens, valid) in enumerate(batches):
                keep, refuse = partial(self._keep, rows, valid), partial(self._refuse_nonfinite, rows)
                kept = run_batch(model, tokens, valid, self.layers, borders, analyzers, keep, refuse)
                if self._store is None:
                    for border, read in kept.items():
                        states[border][rows] = read
                elif kept:
                    self._shards |= write_borders(self._store, index, rows, kept)
                bar.update(len(rows))
        self._states = states or self._states  # only now: an interrupted reading must not pass for one

    def _refuse_nonfinite(self, rows: Tensor, border: int, states: Tensor) -> None:
        wrong = ~torch.isfinite(states).all(1)
        if bool(wrong.any()):
            row = int(rows[wrong][0])
            raise CaptureError(
                f"expected finite states, got NaN or infinity in {int(wrong.sum())} of {len(rows)} tokens at the border "
                f"before block {border}, first in sequence {int(self.row_seq[row])}, position {int(self.row_pos[row])}. "
                "Check the weights, or use a wider dtype."
            )

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the capture to a new folder: safetensors and JSON, all of it or nothing.

        Raises:
            StoreError: the folder exists or cannot be written, or states on disk are not as they were written. CaptureError: nothing read yet.
        """
        if not self.is_read:
            raise CaptureError("expected a capture that the model has read, got one that is only planned. Call read(model) first.")
        with new_folder(path) as folder:
            shards = self._shards
            if self._store is not None:
                copy_borders(self._store, folder, shards)
            else:
                shards = write_borders(folder, 0, torch.arange(self.n_rows, device="cpu"), self._states)
            self._write_record(folder, shards)

    def check_store(self) -> None:
        """Prove all that is kept on disk, which else happens file by file when it is first read.

        Raises:
            StoreError: a file that is missing or was changed.
        """
        if self._store is not None:
            check_shards(self._store, self._shards)

    def _write_record(self, folder: Path, shards: Mapping[str, Any]) -> None:
        record = {
            "sequences": [asdict(s) for s in self.sequences],
            "passages": None if self.passages is None else [asdict(p) for p in self.passages],
            "docs": self.docs, "labels": self.labels, "strings": list(self.strings.items()), "layers": self.layers, "model": self.model,
            "settings": self.settings,
        }  # fmt: skip
        write_record(folder, record, self.columns, self._readings, shards)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Capture":
        """Read a capture that `save` or `store=` wrote; states stay on disk until asked for.

        All but the states is checked against its digest here, each file of states when it is first read (a second for 1 to 2 GB).

        Raises:
            StoreError: no capture there, one that is not as it was written, or one of an earlier version.
        """
        return cls(**read_capture(Path(path).absolute()))
