"""A model and texts -> `Capture`: one row per token, the residual states at block borders, and what was measured on the way.

A block border b is the state that enters block b; border `n_layers` is the state that leaves the last block. One forward pass
per batch; only the hook points asked for are read, and token analyzers are filled while the pass runs, layer by layer, so
that attention patterns are never held for more than one layer.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens import model as door
from basin_lens.errors import BasinLensError, CaptureError, StoreError
from basin_lens.texts import (
    Passage,
    TokenSequence,
    from_token_ids,
    longest_sequence,
    read_passages,
    reference_passages,
    token_strings,
    tokenize,
)

_FORMAT = 1
_TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class TokenBatch:
    """One batch at one layer, as a token analyzer sees it.

    `values[name]` holds what the analyzer `needs`, `[batch, pos, ...]` (`pattern`: `[batch, head, query, key]`). `memory` is the
    analyzer's own scratch, kept from layer to layer (ascending) of the same batch.
    """

    layer: int
    n_layers: int
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    values: Mapping[str, Tensor]
    memory: dict[str, Any]


@runtime_checkable
class TokenMeasure(Protocol):
    """What a capture asks of a token analyzer (`basin_lens.analyzers.TokenAnalyzer` is the base class)."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def per_layer(self) -> bool: ...
    @property
    def target(self) -> str | None: ...
    @property
    def key(self) -> str: ...
    def measure(self, batch: TokenBatch) -> dict[str, Tensor]: ...


@dataclass
class Capture:
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

    sequences: list[TokenSequence]
    passages: list[Passage] | None
    docs: list[str]
    labels: list[dict[str, Any]]
    layers: tuple[int, ...]
    model: dict[str, Any]
    strings: dict[int, str]
    settings: dict[str, Any]
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _states: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _readings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _store: Path | None = None

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        model: Any,
        data: Any,
        *,
        layers: Sequence[int] | None = None,
        analyzers: Sequence[TokenMeasure] | None = None,
        max_length: int = 128,
        batch_size: int | None = None,
        prepend_bos: bool | None = None,
        store: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> "Capture":
        """Run the model once over texts and keep the residual states around each of `layers`.

        Args:
            model: a `TransformerBridge` or `HookedTransformer`, in any state (train mode, frozen, other device).
            data: a text, a `Passage`, a path, a list of these, a dataset with a `text` column, or a LongTensor `[batch, pos]`.
            layers: block indices; None: all.
            analyzers: token analyzers to fill during the pass; None: none.
            max_length: longest sequence in tokens, BOS counted (the model's context if that is shorter); longer texts become
                several sequences.
            batch_size: sequences per pass; None: about 1,000 tokens.
            prepend_bos: None: the model's default.
            store: a new folder to keep the states in instead of memory (safetensors, one file per batch).
            progress: show a progress bar.

        Raises:
            ModelError, TextError: see there.
            CaptureError: unknown layer, NaN or infinite states, a missing hook point.
            StoreError: the folder exists or cannot be written.
        """
        door.check_model(model)
        chosen = check_layers(model, layers)
        token_analyzers = list(analyzers or [])
        if isinstance(data, Tensor):
            passages, sequences = None, from_token_ids(model, data)
        else:
            passages = read_passages(data)
            sequences = tokenize(model, passages, max_length=max_length, prepend_bos=prepend_bos)
        bos = door.uses_bos(model, prepend_bos) if passages is not None else None
        longest = longest_sequence(model, max_length)
        settings = {"max_length": longest, "bos": bos, "source": "tokens" if passages is None else "texts"}
        capture = cls._empty(model, sequences, passages, chosen, settings)
        if store is None:
            capture._fill(model, token_analyzers, batch_size, progress, keep_states=True)
        else:
            with _new_folder(store) as folder:
                capture._store = folder
                capture._fill(model, token_analyzers, batch_size, progress, keep_states=True)
                capture._write_record(folder)
            capture._store = Path(store)
        return capture

    @classmethod
    def from_cache(
        cls,
        model: Any,
        tokens: Int[Tensor, "*batch pos"],
        cache: Mapping[str, Tensor],
        *,
        attention_mask: Tensor | None = None,
        docs: Sequence[str] | None = None,
        labels: Sequence[Mapping[str, Any]] | None = None,
        texts: Sequence[str | Passage] | str | None = None,
    ) -> "Capture":
        """A capture from the user's own `run_with_cache`, without another pass.

        Reads the residual states, and logits, attention patterns and gradients (`*_grad`) if the cache has them, as copies.
        All layers of which both `resid_pre` and `resid_post` can be found are available.

        Args:
            model: the model that made the cache.
            tokens: the token ids given to the model, `[batch, pos]` or `[pos]`.
            cache: an `ActivationCache` or a dict, with or without batch dimension.
            attention_mask: 1 for real tokens, 0 for padding on either side; None: all real.
            docs: document of each sequence; None: a document each.
            labels: labels of each sequence.
            texts: the text of each sequence, to have character offsets in the table.

        Raises:
            CaptureError: no usable layer (the missing hook points are named), shapes that do not fit tokens or model, NaN.
            TextError: the texts do not tokenize to `tokens`.
        """
        door.check_model(model)
        if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2):
            raise CaptureError("expected tokens as a LongTensor [batch, pos] or [pos]: the ids that were given to run_with_cache.")
        shape = (1, *tokens.shape) if tokens.ndim == 1 else tuple(tokens.shape)
        tokens = tokens.detach().cpu().reshape(shape)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.numel() != tokens.numel():
                raise CaptureError(f"expected an attention mask of shape {shape}, got {tuple(attention_mask.shape)}.")
            valid = attention_mask.detach().cpu().reshape(shape).bool()
            # A run of real tokens; a hole inside would shift the positions that the model used.
            if bool((valid.long().diff(dim=1).abs().sum(1) + (valid[:, 0] != valid[:, -1]).long() > 2).any()):
                raise CaptureError("expected padding at one end of each sequence, got an attention mask with a hole.")
        borders, missing = _borders_in(model, cache, shape)
        layers = tuple(layer for layer in range(door.n_layers(model)) if layer in borders and layer + 1 in borders)
        if not layers:
            raise CaptureError(
                f"expected a cache with residual states around at least one block, got none; missing: {', '.join(missing[:6])}"
                f"{', ...' if len(missing) > 6 else ''}. Cache them: run_with_cache(tokens, names_filter=lambda name: "
                '"resid_pre" in name or "resid_post" in name).'
            )
        sequences = from_token_ids(model, tokens, valid)
        passages = None
        if texts is not None:
            passages = read_passages(texts)
            sequences = _align(model, passages, sequences)
        if docs is not None and len(docs) != len(sequences):
            raise CaptureError(f"expected one document for each of {len(sequences)} sequences, got {len(docs)}.")
        if labels is not None and len(labels) != len(sequences):
            raise CaptureError(f"expected labels for each of {len(sequences)} sequences, got {len(labels)}.")
        settings = {"bos": None, "source": "cache", "max_length": shape[1]}
        capture = cls._empty(model, sequences, passages, layers, settings)
        if docs is not None:
            capture.docs = [str(doc) for doc in docs]
        if labels is not None:
            capture.labels = [dict(label) for label in labels]
        needed = sorted({border for layer in layers for border in (layer, layer + 1)})
        for border in needed:
            # Indexing by the mask copies: nothing of the user's cache stays referenced.
            capture._states[border] = borders[border].detach()[valid.to(borders[border].device)].float().cpu()
        for name, value in _other_readings(model, cache, shape, layers).items():
            capture._readings[name] = value.detach().float().cpu().clone()
        if capture._readings:
            capture._readings["valid"] = valid
        capture._check_states()
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
        return cls(sequences, passages, docs, labels, layers, door.provenance(model), strings, settings)

    # -- rows ---------------------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> Int[Tensor, " seqs"]:
        """Tokens per sequence."""
        return torch.tensor([len(s.tokens) for s in self.sequences])

    @cached_property
    def offsets(self) -> Int[Tensor, " seqs"]:
        """First row of each sequence."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def n_rows(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum())

    @cached_property
    def row_seq(self) -> Int[Tensor, " rows"]:
        """Sequence of each row."""
        return torch.repeat_interleave(torch.arange(len(self.sequences)), self.lengths)

    @cached_property
    def row_pos(self) -> Int[Tensor, " rows"]:
        """Position in its sequence of each row, from 0 (the BOS token, if there is one)."""
        return torch.arange(self.n_rows) - self.offsets[self.row_seq]

    @cached_property
    def row_token(self) -> Int[Tensor, " rows"]:
        """Token id of each row."""
        return torch.tensor([token for s in self.sequences for token in s.tokens])

    @cached_property
    def valid(self) -> Bool[Tensor, "seqs pos"]:
        """Which cells of the right-padded `[sequence, position]` grid are tokens."""
        return torch.arange(int(self.lengths.max()))[None] < self.lengths[:, None]

    def row_strings(self) -> list[str]:
        """Text of each row's token by itself."""
        return [self.strings[token] for token in self.row_token.tolist()]

    def row_of(self, seq: int, pos: int) -> int:
        """Row of a token.

        Raises:
            CaptureError: there is no such token.
        """
        if not 0 <= seq < len(self.sequences) or not 0 <= pos < int(self.lengths[seq]):
            known = f"sequence {seq} has {int(self.lengths[seq])} tokens" if 0 <= seq < len(self.sequences) else (
                f"there are {len(self.sequences)} sequences"
            )  # fmt: skip
            raise CaptureError(f"expected a token of this capture, got seq={seq}, pos={pos}; {known}.")
        return int(self.offsets[seq]) + pos

    # -- states -------------------------------------------------------------------------------------------------------

    def resid_pre(self, layer: int) -> Float[Tensor, "rows d"]:
        """States entering block `layer`, float32, on the CPU, in row order."""
        return self._border(layer)

    def resid_post(self, layer: int) -> Float[Tensor, "rows d"]:
        """States leaving block `layer`, float32, on the CPU, in row order."""
        return self._border(layer + 1)

    def _border(self, border: int) -> Tensor:
        if self._store is not None:
            shards = sorted(self._store.glob("states-*.safetensors"))
            pieces = []
            for shard in shards:
                with safe_open(shard, framework="pt") as file:
                    if f"border.{border}" in file.keys():  # noqa: SIM118 - safe_open is no mapping
                        pieces.append((file.get_tensor("rows"), file.get_tensor(f"border.{border}")))
            if pieces:
                states = torch.empty(self.n_rows, pieces[0][1].shape[1])
                for rows, values in pieces:
                    states[rows] = values
                return states
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
        if door.fingerprint(model) != self.model["fingerprint"]:
            raise CaptureError(
                f"expected the model that made this capture ({self.model['name']}, {self.model['fingerprint'][:8]}), got "
                f"{door.full_name(model)} ({door.fingerprint(model)[:8]}). Weights, settings or weight processing differ: "
                "capture again with this model."
            )

    # -- token analyzers ----------------------------------------------------------------------------------------------

    def measure(self, model: Any, analyzers: Sequence[TokenMeasure], *, progress: bool = True) -> list[str]:
        """Fill the columns of token analyzers that are not there yet: from what was read, else with one more pass.

        Returns:
            keys of the analyzers for which the model ran again.

        Raises:
            CaptureError: a hook point or a gradient that is not to be had.
        """
        open_ = [a for a in analyzers if a.key not in self.columns]
        again = []
        for analyzer in open_:
            if self._readable(analyzer):
                self._measure_readings(analyzer)
            else:
                again.append(analyzer)
        stuck = [a.key for a in again if a.target == "cache"]
        if stuck:
            raise CaptureError(
                f"expected gradients (*_grad) in the cache for {stuck[0]}, got none. Make the capture with Capture.from_cache on a "
                "run_with_cache(..., incl_bwd=True), or use another target."
            )
        if again:
            self._fill(model, again, None, progress, keep_states=False)
        return [analyzer.key for analyzer in again]

    def _readable(self, analyzer: TokenMeasure) -> bool:
        if analyzer.needs <= {"resid_pre", "resid_post"} and analyzer.target is None:
            return True
        if self.settings["source"] != "cache" or analyzer.target not in (None, "cache"):
            return False
        layers = self.layers if analyzer.per_layer else self.layers[:1]
        return all(self._reading(need, layer) is not None for layer in layers for need in analyzer.needs)

    def _reading(self, need: str, layer: int) -> Tensor | None:
        """A reading in the layout of the user's cache, `[batch, pos, ...]`."""
        if need in ("resid_pre", "resid_post"):
            return self._grid(self._border(layer + (need == "resid_post")))
        name = need if need == "logits" else f"{need}.{layer}"
        value = self._readings.get(name)
        if value is None:
            return None
        # Bring left padding to the right: every analyzer counts positions from 0.
        valid = self._readings["valid"]
        first = valid.int().argmax(1).tolist()
        longest = int(self.lengths.max())
        rolled = [
            torch.roll(row, (-f, -f), (1, 2)) if need == "pattern" else torch.roll(row, -f, 0)
            for row, f in zip(value, first, strict=True)
        ]
        grid = torch.stack(rolled)
        return grid[:, :, :longest, :longest] if need == "pattern" else grid[:, :longest]

    def _grid(self, rows: Tensor) -> Tensor:
        grid = rows.new_zeros((*self.valid.shape, *rows.shape[1:]))
        grid[self.valid] = rows
        return grid

    def _measure_readings(self, analyzer: TokenMeasure) -> None:
        tokens = self._grid(self.row_token)
        memory: dict[str, Any] = {}
        for layer in self.layers if analyzer.per_layer else self.layers[:1]:
            values = {need: reading for need in analyzer.needs if (reading := self._reading(need, layer)) is not None}
            batch = TokenBatch(layer, self.model["layers"], tokens, self.valid, values, memory)
            self._keep(analyzer, layer, torch.arange(self.n_rows), self.valid, analyzer.measure(batch))

    def _keep(self, analyzer: TokenMeasure, layer: int, rows: Tensor, valid: Tensor, values: Mapping[str, Tensor]) -> None:
        columns = self.columns.setdefault(analyzer.key, {})
        for name, value in values.items():
            if value.ndim == 1:  # one number per sequence: repeated on its tokens
                value = value[:, None].expand(valid.shape)
            if value.shape != valid.shape:
                raise CaptureError(
                    f"expected {analyzer.key} to give [batch, pos] or [batch] for {name!r}, got {tuple(value.shape)}."
                )
            height = self.model["layers"] if analyzer.per_layer else 1
            column = columns.setdefault(name, torch.full((height, self.n_rows), torch.nan))
            column[layer if analyzer.per_layer else 0, rows] = value.detach()[valid.to(value.device)].float().cpu()

    # -- the pass -----------------------------------------------------------------------------------------------------

    def _fill(
        self, model: Any, analyzers: Sequence[TokenMeasure], batch_size: int | None, progress: bool, *, keep_states: bool
    ) -> None:
        """Run the model over all sequences; keep states and fill analyzers."""
        self._check_points(model, analyzers)
        borders = sorted({border for layer in self.layers for border in (layer, layer + 1)}) if keep_states else []
        if keep_states and self._store is None:
            self._states = {border: torch.empty(self.n_rows, door.width(model)) for border in borders}
        batches = list(self._batches(batch_size))
        with tqdm(total=self.n_rows, desc="reading the model", unit="token", disable=not progress) as bar:
            for index, (rows, tokens, valid) in enumerate(batches):
                _run_batch(model, self, analyzers, borders, rows, tokens, valid, shard=index)
                bar.update(len(rows))

    def _check_points(self, model: Any, analyzers: Sequence[TokenMeasure]) -> None:
        points = {need for a in analyzers for need in a.needs if need not in ("logits", "gradient")}
        missing = door.missing_points(model, points | {"resid_pre", "resid_post"}, list(self.layers))
        if missing:
            raise CaptureError(
                f"expected the hook points the analyzers need, got a model without {', '.join(missing[:4])}"
                f"{', ...' if len(missing) > 4 else ''}. Leave out the analyzers that need them."
            )

    def _batches(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, right-padded tokens and validity of batches of sequences of like length."""
        order = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i].tokens))
        while order:
            longest = len(self.sequences[order[0]].tokens)
            size = batch_size or max(1, _TOKENS_PER_BATCH // longest)
            chosen, order = order[:size], order[size:]
            lengths = self.lengths[chosen]
            valid = torch.arange(longest)[None] < lengths[:, None]
            rows = torch.cat([torch.arange(int(self.lengths[i])) + self.offsets[i] for i in chosen])
            # Any id will do as padding: no real token of a causal model sees it.
            tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
            tokens[valid] = self.row_token[rows]
            yield rows, tokens, valid

    def _check_states(self) -> None:
        for border, states in self._states.items():
            _refuse_nonfinite(self, border, torch.arange(self.n_rows), states)

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the capture to a new folder: safetensors and JSON, all of it or nothing.

        Raises:
            StoreError: the folder exists or cannot be written.
        """
        with _new_folder(path) as folder:
            if self._store is not None:
                for shard in self._store.glob("states-*.safetensors"):
                    shutil.copy2(shard, folder)
            else:
                tensors = {f"border.{border}": states.contiguous() for border, states in self._states.items()}
                save_file({"rows": torch.arange(self.n_rows), **tensors}, folder / "states-00000.safetensors")
            self._write_record(folder)

    def _write_record(self, folder: Path) -> None:
        tensors = {f"column|{key}|{name}": v for key, columns in self.columns.items() for name, v in columns.items()}
        tensors |= {f"reading|{name}": value.contiguous() for name, value in self._readings.items()}
        if tensors:
            save_file(tensors, folder / "values.safetensors")
        record = {
            "format": _FORMAT,
            "sequences": [asdict(s) for s in self.sequences],
            "passages": None if self.passages is None else [asdict(p) for p in self.passages],
            "docs": self.docs,
            "labels": self.labels,
            "layers": self.layers,
            "model": self.model,
            "strings": list(self.strings.items()),
            "settings": self.settings,
        }
        try:
            text = json.dumps(record)
        except TypeError as error:
            raise StoreError(f"expected labels that JSON can hold (text, numbers, booleans), got: {error}.") from error
        (folder / "capture.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Capture":
        """Read a capture that `save` or `store=` wrote; states stay on disk until asked for.

        Raises:
            StoreError: no capture there, or one of an unknown format.
        """
        folder = Path(path)
        try:
            record = json.loads((folder / "capture.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise StoreError(f"expected a saved capture (a folder with capture.json) at {str(folder)!r}, got: {error}.") from error
        if record.get("format") != _FORMAT:
            raise StoreError(f"expected capture format {_FORMAT}, got {record.get('format')}. Use the version that wrote it.")
        passages = None
        if record["passages"] is not None:
            passages = [Passage(**p) for p in record["passages"]]
        sequences = [
            TokenSequence(tuple(s["tokens"]), s["passage"], tuple(s["starts"]), tuple(s["ends"])) for s in record["sequences"]
        ]
        capture = cls(
            sequences, passages, record["docs"], record["labels"], tuple(record["layers"]), record["model"],
            {int(token): text for token, text in record["strings"]}, record["settings"], _store=folder,
        )  # fmt: skip
        if (folder / "values.safetensors").is_file():
            with safe_open(folder / "values.safetensors", framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    kind, rest = name.split("|", 1)
                    if kind == "reading":
                        capture._readings[rest] = file.get_tensor(name)
                    else:
                        key, column = rest.rsplit("|", 1)
                        capture.columns.setdefault(key, {})[column] = file.get_tensor(name)
        return capture


def check_layers(model: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers in ascending order; None: all; negative ones count from the end.

    Raises:
        CaptureError: a layer that the model does not have.
    """
    count = door.n_layers(model)
    if layers is None:
        return tuple(range(count))
    wrong = [layer for layer in layers if not isinstance(layer, int) or not -count <= layer < count]
    if wrong or not len(layers):
        raise CaptureError(f"expected layers between 0 and {count - 1}, got {wrong or 'none'}.")
    return tuple(sorted({layer % count for layer in layers}))


def reference_capture(model: Any, layers: Sequence[int], *, prepend_bos: bool | None = None, progress: bool = True) -> Capture:
    """The built-in passages under this model: read once, then kept in the user's cache folder by fingerprint.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    door.check_model(model)
    passages = list(reference_passages())
    length = longest_sequence(model, 256)
    names = [door.fingerprint(model), str(door.uses_bos(model, prepend_bos)), str(length), *(p.text for p in passages)]
    import hashlib

    identity = hashlib.blake2b("\x00".join(names).encode(), digest_size=16).hexdigest()
    folder = door.cache_folder() / "reference" / identity
    if not (folder / "capture.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"expected a writable cache folder, got {error}. Set BASIN_LENS_CACHE to another folder.") from error
        Capture.from_texts(model, passages, max_length=length, prepend_bos=prepend_bos, store=folder, progress=progress)
    return Capture.load(folder)


def _run_batch(
    model: Any,
    capture: Capture,
    analyzers: Sequence[TokenMeasure],
    borders: list[int],
    rows: Tensor,
    tokens: Tensor,
    valid: Tensor,
    shard: int,
) -> None:
    """One forward pass (and one backward pass if an analyzer wants gradients) over a batch."""
    device = door.device_of(model)
    tokens, valid_there = tokens.to(device), valid.to(device)
    gradients = any(a.target is not None for a in analyzers)
    count = door.n_layers(model)
    memories: dict[str, dict[str, Any]] = {a.key: {} for a in analyzers}
    held: dict[int, dict[str, Tensor]] = {layer: {} for layer in capture.layers}
    live: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    at_layer = [a for a in analyzers if a.per_layer and a.target is None and "logits" not in a.needs]
    at_end = [a for a in analyzers if a not in at_layer]
    needed_at_end = {need for a in at_end for need in a.needs}

    def run(analyzer: TokenMeasure, layer: int, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            batch = TokenBatch(layer, count, tokens, valid_there, values, memories[analyzer.key])
            capture._keep(analyzer, layer, rows, valid, analyzer.measure(batch))

    def read_state(border: int) -> Callable[[Tensor], None]:
        def reader(state: Tensor) -> None:
            if border in borders:
                kept[border] = state.detach()[valid_there].float().cpu()
                _refuse_nonfinite(capture, border, rows, kept[border])
            if gradients and border in held:
                live[border] = state
            if border in held and wants("resid_pre"):
                held[border]["resid_pre"] = state.detach().float()
            # The state leaving a block closes it: all that its analyzers need has been read by then.
            layer = border - 1
            if layer in held:
                if wants("resid_post"):
                    held[layer]["resid_post"] = state.detach().float()
                for analyzer in at_layer:
                    run(analyzer, layer, {need: held[layer][need] for need in analyzer.needs})
                held[layer] = {need: value for need, value in held[layer].items() if need in needed_at_end}

        return reader

    def wants(need: str) -> bool:
        return any(need in a.needs for a in analyzers)

    def read_point(need: str, layer: int) -> Callable[[Tensor], None]:
        def reader(value: Tensor) -> None:
            held[layer][need] = value.detach().float()

        return reader

    readers: dict[str, Callable[[Tensor], Tensor | None]] = {}
    for border in sorted({b for layer in capture.layers for b in (layer, layer + 1)}):
        # A layer whose analyzers run when it closes is read at its own end, not at the next block's start.
        if border < count:
            readers[door.point_name("resid_pre", border)] = read_state(border)
        else:
            readers[door.point_name("resid_post", count - 1)] = read_state(count)
    points = {need for a in analyzers for need in a.needs} - {"logits", "gradient", "resid_pre", "resid_post"}
    for layer in capture.layers:
        for need in points:
            readers[door.point_name(need, layer)] = read_point(need, layer)

    with door.measuring(model, gradients=gradients):
        logits = door.forward_pass(model, tokens, readers, gradients=gradients)
        if gradients:
            borders_live = sorted(live)
            loss = future_loss(logits, tokens, valid_there)
            slopes = torch.autograd.grad(loss, [live[border] for border in borders_live])
            for layer, slope in zip(borders_live, slopes, strict=True):
                held[layer]["gradient"] = slope.detach().float()
    logits = logits.detach()
    for analyzer in at_end:
        for layer in capture.layers if analyzer.per_layer else capture.layers[:1]:
            run(analyzer, layer, {n: logits.float() if n == "logits" else held[layer][n] for n in analyzer.needs})
    if capture._store is None:
        for border, states in kept.items():
            capture._states[border][rows] = states
    elif kept:
        tensors = {f"border.{border}": states for border, states in kept.items()}
        save_file({"rows": rows, **tensors}, capture._store / f"states-{shard:05d}.safetensors")


def future_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Sum over tokens of -log p(token | those before it), in nats.

    Its gradient at position i is that of the loss of the tokens after i, because a state cannot reach earlier predictions.
    """
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * valid[:, 1:]).sum()


def _refuse_nonfinite(capture: Capture, border: int, rows: Tensor, states: Tensor) -> None:
    wrong = ~torch.isfinite(states).all(1)
    if bool(wrong.any()):
        row = int(rows[wrong][0])
        raise CaptureError(
            f"expected finite states, got NaN or infinity in {int(wrong.sum())} of {len(rows)} tokens at the border before block "
            f"{border}, first in sequence {int(capture.row_seq[row])}, position {int(capture.row_pos[row])}. "
            "Check the weights, or use a wider dtype."
        )


def _borders_in(model: Any, cache: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[dict[int, Tensor], list[str]]:
    """Residual states at each border that the cache holds, `[batch, pos, d]`, and the names of those it does not."""
    count, found, missing = door.n_layers(model), {}, []
    for border in range(count + 1):
        point, layer = ("resid_pre", border) if border < count else ("resid_post", count - 1)
        state = door.cache_entry(cache, point, layer)
        if state is None:
            missing.append(door.point_name(point, layer))
            continue
        state = _batched(state, 3)
        if tuple(state.shape) != (*shape, door.width(model)):
            raise CaptureError(
                f"expected {door.point_name(point, layer)} of shape {(*shape, door.width(model))} (batch, pos, d_model), got "
                f"{tuple(state.shape)}. Are tokens, cache and model of the same run?"
            )
        found[border] = state
    return found, missing


def _other_readings(model: Any, cache: Mapping[str, Tensor], shape: tuple[int, ...], layers: tuple[int, ...]) -> dict[str, Tensor]:
    found = {}
    logits = door.cache_entry(cache, "logits", 0)
    if logits is not None and logits.shape[-1] >= door.vocabulary_size(model):
        found["logits"] = _batched(logits, 3)
    for layer in layers:
        pattern = door.cache_entry(cache, "pattern", layer)
        if pattern is not None:
            found[f"pattern.{layer}"] = _batched(pattern, 4)
        gradient = door.cache_entry(cache, "resid_pre", layer, suffix="_grad")
        if gradient is not None:
            found[f"gradient.{layer}"] = _batched(gradient, 3)
    for name, value in found.items():
        if value.shape[0] != shape[0] or value.shape[-2] != shape[1]:
            raise CaptureError(f"expected {name} for {shape} tokens, got shape {tuple(value.shape)}.")
    return found


def _batched(value: Tensor, dims: int) -> Tensor:
    return value[None] if value.ndim == dims - 1 else value


def _align(model: Any, passages: list[Passage], sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Give the user's token sequences the offsets of their texts, which must tokenize to them."""
    if len(passages) != len(sequences):
        raise CaptureError(f"expected one text for each of {len(sequences)} sequences, got {len(passages)}.")
    aligned = []
    for index, (passage, sequence) in enumerate(zip(passages, sequences, strict=True)):
        for bos in (False, True):
            try:
                (own,) = tokenize(model, [passage], max_length=len(sequence.tokens), prepend_bos=bos)
            except (BasinLensError, ValueError):
                continue
            if own.tokens == sequence.tokens:
                aligned.append(TokenSequence(sequence.tokens, index, own.starts, own.ends))
                break
        else:
            raise CaptureError(
                f"expected text {index} to tokenize to the tokens given, got other tokens from {passage.text[:40]!r}. "
                "Leave texts out, or tokenize with the model's own tokenizer."
            )
    return aligned


class _new_folder:  # noqa: N801 - reads as a verb in `with _new_folder(path) as folder`
    """A folder that appears under its name only when it is complete."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(path)

    def __enter__(self) -> Path:
        if self.target.exists():
            raise StoreError(f"expected a new folder, got {str(self.target)!r}, which exists. Choose another name or delete it.")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.scratch = Path(tempfile.mkdtemp(prefix=f".{self.target.name}-", dir=self.target.parent))
        except OSError as error:
            raise StoreError(f"expected a folder that can be written, got {str(self.target)!r}: {error.strerror}.") from error
        return self.scratch

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
            return
        self.scratch.rename(self.target)
