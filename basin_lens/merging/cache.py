"""Generation with a key/value cache of one row per cluster: the same numbers as whole sequences, in less memory."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from basin_lens.errors import MergeError
from basin_lens.merging.assignment import Clusters
from basin_lens.merging.attention import normalized
from basin_lens.merging.merge_pass import Carry, Reader, alone_in, context_statistics
from basin_lens.merging.parameters import Parameters
from basin_lens.merging.similarity import row_likeness, row_read
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.model import (
    HookedModel,
    device_of,
    end_tokens,
    measuring,
    n_context,
    n_layers,
    own_rows,
    point_name,
    reading,
    vocabulary_size,
)
from basin_lens.values import hides_bars, whole_numbers


@dataclass
class _Waiting:
    """A token in the recent window."""

    place: int
    descriptor: Float[np.ndarray, " width"]
    level: float
    eligible: bool
    row: Float[np.ndarray, " pos"] | None = None


class _Sequence:
    """Keys and values of one sequence in one layer."""

    def __init__(self, parameters: Parameters | None, index: int, layer: int) -> None:
        self.parameters, self.index = parameters, index
        self.keys: Float[Tensor, "kv rows d_head"] | None = None
        self.values: Float[Tensor, "kv rows d_head"] | None = None
        self.places = np.zeros(0, np.int32)
        self.waiting: deque[_Waiting] = deque()
        self.residuals: list[Tensor] = []
        self.rows: list[Float[np.ndarray, " pos"]] = []
        if parameters is not None:
            o = parameters.options
            mean = o.representative == "mean"
            self.clusters = Clusters(o.rule, parameters.compared_width, mean=mean, seed=(o.seed, layer))

    def settle(self, token: _Waiting) -> None:
        """The token leaves the recent window: it joins a cluster, opens one, or stays raw for good."""
        assert self.parameters is not None and self.keys is not None and self.values is not None
        if not token.eligible:
            return
        o, clusters = self.parameters.options, self.clusters
        likeness = None
        if o.attention_weight and clusters.count:
            # A row is as long as its token's past; the later one decides how long both have to be.
            others = np.stack([np.pad(row, (0, token.place + 1 - len(row))) for row in self.rows])
            assert token.row is not None
            likeness = row_likeness(token.row, others, clusters.leaders[: clusters.count])
        leader, joins = clusters.offer(token.place, token.descriptor, token.level, likeness=likeness, weight=o.attention_weight)
        if not joins:
            if token.row is not None:
                self.rows.append(token.row)
            if self.parameters.down is not None:
                self.residuals.append(torch.zeros(self.parameters.down.shape[1], device=self.keys.device))
            return
        row = int(np.flatnonzero(self.places == token.place)[0])
        if not o.drop:
            self._absorb(row, leader)
        left = np.delete(np.arange(len(self.places)), row)
        chosen = torch.from_numpy(left).to(self.keys.device)
        self.keys, self.values, self.places = self.keys[:, chosen], self.values[:, chosen], self.places[left]

    def _absorb(self, row: int, leader: int) -> None:
        """The member's value goes into its cluster's mean, or residual."""
        assert self.parameters is not None and self.values is not None
        o = self.parameters.options
        at = int(np.flatnonzero(self.places == leader)[0])
        number = int(np.flatnonzero(self.clusters.leaders[: self.clusters.count] == leader)[0])
        size = int(self.clusters.sizes[number])
        if o.representative == "mean":
            self.values[:, at] += (self.values[:, row] - self.values[:, at]) / size
        elif self.parameters.down is not None:
            change = (self.values[:, row] - self.values[:, at]).reshape(-1)
            self.residuals[number] = self.residuals[number] + self.parameters.shrink_residual(self.index, change).float()

    def append(self, keys: Float[Tensor, "kv 1 d_head"], values: Float[Tensor, "kv 1 d_head"], place: int) -> None:
        """The current token's row."""
        self.keys = keys.clone() if self.keys is None else torch.cat([self.keys, keys], 1)
        self.values = values.clone() if self.values is None else torch.cat([self.values, values], 1)
        self.places = np.append(self.places, np.int32(place))

    def read_values(self) -> Float[Tensor, "kv rows d_head"]:
        """Values with their residuals put back."""
        assert self.values is not None
        if self.parameters is None or self.parameters.down is None or not self.residuals:
            return self.values
        read = self.values.clone()
        sizes = torch.from_numpy(self.clusters.sizes[: self.clusters.count]).to(read.device)
        means = torch.stack(self.residuals) / sizes[:, None]
        change = self.parameters.expand_residual(self.index, means.to(read.dtype))
        rows = torch.from_numpy(np.searchsorted(self.places, self.clusters.leaders[: self.clusters.count])).to(read.device)
        read[:, rows] += change.reshape(len(rows), read.shape[0], -1).transpose(0, 1)
        return read

    def sizes(self) -> Float[np.ndarray, " rows"]:
        """Factor of each row's attention mass."""
        made = np.ones(len(self.places))
        if self.parameters is not None and not self.parameters.options.drop:
            rows = np.searchsorted(self.places, self.clusters.leaders[: self.clusters.count])
            made[rows] = self.clusters.sizes[: self.clusters.count]
        return made

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, tensor by tensor."""
        tensors = [t for t in (self.keys, self.values, *self.residuals) if t is not None]
        arrays = [row for row in (*self.rows, *(w.row for w in self.waiting)) if row is not None]
        arrays += [w.descriptor for w in self.waiting]
        held = sum(t.numel() * t.element_size() for t in tensors) + sum(a.nbytes for a in arrays)
        return held if self.parameters is None else held + self.places.nbytes + self.clusters.nbytes


class _Layer:
    """`model.RowStore` of one layer: all sequences of the batch."""

    def __init__(self, parameters: Parameters | None, index: int, layer: int, batch: int) -> None:
        self.parameters, self.index, self.layer = parameters, index, layer
        self.length = 0
        self.sequences = [_Sequence(parameters, index, layer) for _ in range(batch)]
        self._carry: Carry | None = None

    @property
    def nbytes(self) -> int:
        carry = 0
        if self._carry is not None:
            carry = sum(t.numel() * t.element_size() for t in self._carry[1:])
        return sum(s.nbytes for s in self.sequences) + carry

    def enter(self, states: Float[Tensor, "batch 1 d"]) -> None:
        """The current token's state: settle the one that leaves the window."""
        assert self.parameters is not None
        units, norms = self.parameters.describe(self.index, states)
        features, carry = context_statistics(units, norms, self._carry)
        self._carry = carry if self.parameters.options.adaptive else None  # only an adaptive threshold asks for it
        levels = self.parameters.level_of(self.index, features)
        o = self.parameters.options
        for b, sequence in enumerate(self.sequences):
            if self.length:
                eligible = o.preserve != "norm" or bool(norms[b, 0] <= self.parameters.norm_cutoff[self.index])
                descriptor = units[b, 0].cpu().half().numpy()
                sequence.waiting.append(_Waiting(self.length, descriptor, float(levels[b, 0]), eligible))
            if len(sequence.waiting) > o.recent:
                sequence.settle(sequence.waiting.popleft())

    def columns(self) -> Int[Tensor, "batch rows"]:
        rows = [torch.from_numpy(np.append(s.places, np.int32(self.length))).long() for s in self.sequences]
        made = pad_sequence(rows, batch_first=True, padding_value=-1)
        keys = self.sequences[0].keys
        return made if keys is None else made.to(keys.device)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for b, sequence in enumerate(self.sequences):
            sequence.append(keys[b], values[b], self.length)
        self.length += 1
        read = [(s.keys.transpose(0, 1), s.read_values().transpose(0, 1)) for s in self.sequences if s.keys is not None]
        both = [pad_sequence(list(part), batch_first=True).transpose(1, 2) for part in zip(*read, strict=True)]
        return both[0], both[1]

    def attend(self, pattern: Float[Tensor, "batch head 1 rows"]) -> Tensor | None:
        """Sizes onto the mass; rows remembered if they are compared."""
        assert self.parameters is not None
        sizes = [torch.from_numpy(s.sizes()) for s in self.sequences]
        factors = pad_sequence(sizes, batch_first=True).to(pattern)
        read = pattern
        if bool((factors != 1).any()):
            mixed = factors[:, None, None] * pattern
            read = normalized(mixed, pattern)
        if self.parameters.options.attention_weight:
            for b, sequence in enumerate(self.sequences):
                if sequence.waiting and sequence.waiting[-1].place == self.length - 1:
                    row = np.zeros(self.length, np.float32)
                    plain = pattern[b, :, 0, : len(sequence.places)].detach().double().cpu().numpy()
                    row[sequence.places] = row_read(plain, sequence.sizes())
                    sequence.waiting[-1].row = row
        return None if read is pattern else read


@dataclass(frozen=True)
class Stream:
    """Steps over a compressed cache: `step(tokens)` -> logits `[batch, vocab]`; `nbytes()` -> bytes held, per layer."""

    step: Callable[[Int[Tensor, " batch"]], Float[Tensor, "batch vocab"]]
    layers: tuple[_Layer, ...]

    def nbytes(self) -> list[int]:
        """Memory of the cache as it stands, layer by layer, in bytes, sequences together."""
        return [layer.nbytes for layer in self.layers]

    def rows(self) -> list[int]:
        """Rows of keys and values that stand, layer by layer, sequences together."""
        return [sum(len(s.places) for s in layer.sequences) for layer in self.layers]


@contextmanager
def streaming(merger: TokenMerger, model: HookedModel, batch: int) -> Iterator[Stream]:
    """One token after another with a compressed cache; the same logits as `TokenMerger.attached` gives for whole sequences.

    Args:
        merger: calibrated or trained.
        model: a bridge.
        batch: sequences; each has its own clusters.

    Returns:
        a `Stream`, for the block.

    Raises:
        ModelError: a HookedTransformer, or another model whose cache cannot be rewritten.
        MergeError: options that need a plain pass (`preserve="surprisal"`), scores, or that save no memory (`simulate`).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> merger = bl.merging.TokenMerger(layers=[20], rule="stride", threshold=0.5, recent=4)
        >>> with bl.merging.streaming(merger, model, 1) as stream:
        ...     for token in model.to_tokens("The lamp hums, and the lamp hums.")[0, :9]:
        ...         logits = stream.step(token[None])
        >>> stream.rows()[20] < stream.rows()[0] == 9
        True
    """
    o = merger.ready(model).options
    if o.simulate or o.preserve == "surprisal" or o.decision.scored or o.decision.sees_future:
        raise MergeError(
            f"expected a merger that can run token by token, got rule {o.rule!r}, preserve {o.preserve!r}, simulate {o.simulate}: "
            "simulation saves no memory, surprisal needs the plain model's pass, and scores are given for whole sequences. "
            "Use rule='cosine', preserve='norm'."
        )
    number = {layer: index for index, layer in enumerate(o.layers)}
    layers = tuple(
        _Layer(merger.weights if layer in number else None, number.get(layer, 0), layer, batch) for layer in range(n_layers(model))
    )
    readers: dict[str, Reader] = {}
    for layer in o.layers:
        readers[point_name("resid_pre", layer)] = layers[layer].enter
        readers[point_name("pattern", layer)] = layers[layer].attend
    with alone_in(model, o.layers), measuring(model), own_rows(model, layers) as step, reading(model, readers):

        def checked(tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
            if len(tokens) != batch:
                raise MergeError(f"expected a token for each of {batch} sequences, got {len(tokens)}.")
            return step(tokens)

        yield Stream(checked, layers)


@whole_numbers(MergeError)
def generate(
    merger: TokenMerger,
    model: HookedModel,
    prompts: Int[Tensor, "*batch pos"],
    length: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    past_end: bool = False,
    progress: bool = False,
) -> tuple[Int[Tensor, "batch length"], pd.DataFrame]:
    """Write up to `length` tokens behind each prompt over a compressed cache.

    Args:
        merger: calibrated or trained.
        model: a bridge.
        prompts: token ids without padding, `[batch, pos]` or `[pos]`; they go through one by one, as everything after them.
        length: most tokens to write.
        temperature: 0: the most likely token each time; else of the softmax they are drawn from.
        seed: of the draw.
        past_end: go on behind the end of a text; else a sequence ends with its end-of-text token (`model.end_tokens`), which fills
            its row while others are being written, and all is over when every sequence has ended.
        progress: show a bar.

    Returns:
        the tokens, at most `length` of each, and a table: per layer `rows`, `bytes` (held at the end: keys, values, indices, sizes,
        descriptors, residuals), `full_rows`, `full_bytes`, all sequences together.

    Raises:
        ModelError: no bridge. MergeError: no token ids of the model, longer than its context, a temperature below 0, logits that
            are no numbers; see `streaming`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> merger = bl.merging.TokenMerger(layers=[20], rule="stride", threshold=0.5, recent=4)
        >>> prompt = model.to_tokens("The lamp hums, and the lamp")
        >>> written, table = bl.merging.generate(merger, model, prompt, 8)
        >>> written.shape[1], bool(table.bytes[20] < table.full_bytes[20])
        (8, True)
    """
    tokens = checked_prompts(model, prompts).to(device_of(model))
    batch, begun = tokens.shape
    if length < 1 or begun + length > n_context(model):
        raise MergeError(
            f"expected a prompt and a continuation within the model's context of {n_context(model)} tokens, got {begun} + "
            f"{length}. Ask for less."
        )
    if not 0 <= temperature < float("inf"):
        raise MergeError(f"expected a temperature from 0 on, got {temperature}. 0 takes the most likely token each time.")
    draw = torch.Generator(device="cpu").manual_seed(seed)
    ends = torch.tensor(sorted(() if past_end else end_tokens(model)), dtype=torch.long, device=tokens.device)
    over = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    written: list[Tensor] = []
    with streaming(merger, model, batch) as stream:
        current = tokens[:, 0]
        for place in tqdm(range(begun + length - 1), desc="writing", unit="token", disable=hides_bars(progress)):
            logits = stream.step(current)
            if place + 1 < begun:
                current = tokens[:, place + 1]
                continue
            current = torch.where(over, current, _next(logits, temperature, draw).to(tokens.device))
            written.append(current.cpu())
            over = over | torch.isin(current, ends)
            if bool(over.all()):
                break
        seen = begun + len(written) - 1
        table = pd.DataFrame(
            {
                "layer": range(len(stream.layers)),
                "rows": stream.rows(),
                "bytes": stream.nbytes(),
                "full_rows": seen * batch,
                "full_bytes": seen * batch * merger.weights.shape.row_bytes,
            }
        )
    return torch.stack(written, 1), table


def checked_prompts(model: HookedModel, prompts: object) -> Int[Tensor, "batch pos"]:
    """Token ids `[batch, pos]`; one prompt `[pos]` is a batch of one.

    Raises:
        MergeError: no token ids, or ids beyond the model's vocabulary.
    """
    if not isinstance(prompts, Tensor) or prompts.dtype not in (torch.int64, torch.int32) or prompts.ndim not in (1, 2):
        got = f"{prompts.dtype} of shape {tuple(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise MergeError(
            f"expected prompts as a LongTensor of token ids [batch, pos] or [pos], got {got}. Tokenize the text first."
        )
    if not prompts.numel():
        raise MergeError(
            f"expected prompts of one token or more, got a tensor of shape {tuple(prompts.shape)}. Give a start token."
        )
    least, most, vocabulary = int(prompts.min()), int(prompts.max()), vocabulary_size(model)
    if least < 0 or most >= vocabulary:
        raise MergeError(f"expected token ids in [0, {vocabulary}), got {least} to {most}. Are these tokens of another model?")
    return prompts.long().reshape(-1, prompts.shape[-1])


def _next(logits: Float[Tensor, "batch vocab"], temperature: float, draw: torch.Generator) -> Int[Tensor, " batch"]:
    """The most likely token of each row, or one that is drawn."""
    if bool(logits.isnan().any()):
        raise MergeError("expected logits, got NaN. Use float32, or another model.")
    if temperature == 0:
        return logits.argmax(-1)
    # From the largest, so that a tiny temperature gives minus infinity, which no draw takes, and never infinity over infinity.
    exact = logits.double().cpu()
    chances = ((exact - exact.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=draw)[:, 0]
