"""Models and states for the tests of transport."""

from dataclasses import dataclass
from functools import cache

import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.transport import LayerMaps, PatchedBlock, Probe, check
from tests.conftest import (
    TEXTS,
    make_bridge,
    make_tokenizer,
)

LAYERS = range(3)


WINDOW = 6  # gemma2's sliding window in conftest: positions from 6 on no longer see position 0


EXACT = 1e-5


@dataclass(repr=False)
class World:
    """A tiny model and a capture of sequences of unequal length (20 tokens down to 3)."""

    model: object
    capture: bl.Capture
    probe: Probe

    def block(self, layer, route=None):
        return PatchedBlock(self.model, self.capture, layer, self.probe, self.capture.resid_pre(layer), route)

    def tokens(self, row):
        return torch.tensor(self.capture.sequences[int(self.capture.row_seq[row])].tokens)

    def oracle(self, layer, queries, points):
        """R0: rerun the whole model."""
        return torch.stack(
            [
                door.rerun_with_state(self.model, self.tokens(query), layer, int(self.capture.row_pos[query]), states)
                for query, states in zip(queries.tolist(), points, strict=True)
            ]
        )

    def error(self, layer, got, expected):
        """Largest root mean square over dimensions, beside that of the layer's states without position 0."""
        scale = self.capture.resid_post(layer)[self.capture.row_pos > 0].square().mean().sqrt()
        return float((got - expected).square().mean(-1).sqrt().max() / scale)

    def maps(self, layer):
        return LayerMaps(self.model, self.capture, self.capture, (self.probe, self.probe), layer)

    def check(self, layer, block=None, **options):
        post = self.capture.resid_post(layer)
        return check(self.model, self.capture, block or self.block(layer), post, others=self.inner(layer), **options)

    def inner(self, layer):
        return self.capture.resid_pre(layer)[self.capture.row_pos > 0]


def build(model, max_length=20):
    capture = bl.Capture.from_texts(model, TEXTS, max_length=max_length, progress=False)
    return World(model, capture, Probe(model, int(capture.lengths.max())))


@cache
def world(name):
    return build(make_bridge(name, tokenizer=make_tokenizer()))


def queries_of(capture):
    """Tokens of several sequences: first, within the window, at its edge, outside, and last, in no order."""
    at = [(0, 12), (3, WINDOW), (0, 1), (2, 2), (13, 8), (0, 0), (6, WINDOW + 1), (3, 19), (0, 5), (4, WINDOW - 1)]
    return torch.tensor([capture.row_of(seq, pos) for seq, pos in at])


def rows_for(capture, queries, m, seed=0):
    """Random rows of the bank for each query, position 0 among them."""
    return torch.randint(capture.n_rows, (len(queries), m), generator=torch.Generator().manual_seed(seed))
