"""Groups of planted states through any map, and what is expected of a crossed table, by loops."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

import basin_lens as bl
from basin_lens.analyzers import CloudScore, Column, Crossing, Surroundings
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.crossed_pass import CrossedPass
from basin_lens.scoring.plan import Plan, SearchOptions
from basin_lens.scoring.search import Searches
from basin_lens.transport import BlockMap
from tests.conftest import random_tokens

D, K, SIZE = 48, 4, 4
EXACT = 2e-5
KINDS = ("neighbors", "random_sets", "isotropic")


@dataclass(frozen=True)
class Parts(CloudScore):
    """The parts of every kind of table, for what analyze does with them."""

    k: int = K
    group: int = SIZE
    scale: float = 1.0
    queries: int | None = None
    displaced: tuple = KINDS
    needs = frozenset({"input_neighbors", "crossed"})

    @property
    def crossing(self):
        return Crossing(self.group, self.scale, self.displaced)

    @property
    def max_queries(self):
        return self.queries

    @property
    def columns(self):
        return tuple(
            Column(f"{self.name or ''}{kind}_{part}", "nats") for kind in self.displaced for part in ("inter", "place", "dirs")
        )

    def measure(self, neighborhoods):
        values = [value.flatten() for kind in self.displaced for value in neighborhoods.crossed[kind].parts()]
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


class World:
    """Planted states of the tokens of a tiny model's capture, and any function in place of its block."""

    def __init__(self, llama, *, d=D, sequences=16, seed=0, states=None, massive=()):
        self.capture = bl.Capture.from_texts(llama, random_tokens(sequences, 10), progress=False)
        count = self.capture.n_rows
        g = torch.Generator().manual_seed(seed)
        self.states = 3 * torch.randn(count, d, generator=g) if states is None else states
        for dimension in massive:
            self.states[:, dimension] *= 100
        self.after = torch.randn(count, d, generator=g)
        asked = torch.ones(count, dtype=torch.bool)
        plan = Plan((1,), 3, (Parts(),), seed=seed)
        self.searches = Searches(llama, self.capture, self.capture, plan.largest_k, asked, "auto", seed)
        self.options = SearchOptions.of(Parts())
        self.found = self.searches.find(self.options, 1, self.states, self.states)
        in_bank = self.capture.row_pos > 0
        self.bank = Surroundings(self.states[in_bank], self.after[in_bank])

    def cross(self, f, *, size=SIZE, scale=1.0, displaced=("neighbors",)):
        """Groups and tables of a map f(rows [q], points [q, m, d])."""

        def nothing(*_):
            raise AssertionError

        passage = BlockMap("patched", self.states, self.after, self.states, self.after, nothing, f)
        crossing = Crossing(size, scale, displaced)
        clouds = Clouds(self.searches, 1, passage, self.bank, self.options, self.found, K, crossing)
        return CrossedPass(clouds)(self.found.near.rows[:, K - 1] >= 0)

    def cloud(self, row):
        near = self.states[self.found.near.rows[row]]
        return near.mean(0), near - near.mean(0)


def matrix(seed, rows=D, columns=D):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rotation(seed):
    return torch.linalg.qr(matrix(seed)).Q


def of_place(seed, *shape):
    """Something of each row's own: a factor, a vector, a matrix."""
    held = torch.randn(200, *shape, generator=torch.Generator().manual_seed(seed))
    return lambda rows: held[rows]


def along(points, directions):
    return (points @ directions) @ directions.T


BASIS = rotation(1)[:, :7]
FACTOR, VECTOR, TURN = of_place(1, 1, 1), of_place(2, 1, D), of_place(3, D, D)
ZEROS = {
    "identity": lambda _, x: x,
    "isometry": lambda _, x: x @ rotation(2) + 4,
    "scaling": lambda _, x: -3 * x,
    "shift": lambda _, x: x + 7,
    "projection": lambda _, x: along(x, BASIS),
    "affine": lambda _, x: x @ matrix(4) + matrix(5, 1),
    "a context vector": lambda rows, x: x + VECTOR(rows),
    "a factor of the place": lambda rows, x: FACTOR(rows).exp() * x,
    "an isometry of the place's own": lambda rows, x: x @ torch.linalg.qr(TURN(rows)).Q + VECTOR(rows),
    "place times directions": lambda rows, x: FACTOR(rows).exp() * (x @ matrix(6)) @ torch.linalg.qr(TURN(rows)).Q + VECTOR(rows),
}


def parts_by_loops(c):
    """Interaction, place and directions of the tokens of one group, from the definition."""
    found = []
    for i in range(len(c)):
        others = [j for j in range(len(c)) if j != i]
        place, directions = np.mean([c[i, q] for q in others]), np.mean([c[p, i] for p in others])
        elsewhere = np.mean([c[p, q] for p in others for q in others if p != q])
        found.append((c[i, i] - place - directions + elsewhere, place, directions))
    return np.array(found).T


class WasRead(Exception):  # noqa: N818 - no error: the rest of the pass is not needed
    """The states that were to be read are there."""


def plain_images(model, layer, tokens, pos, points, blocks):
    """States behind some blocks of a plain transformers model, where `points` enter block `layer` at one position."""
    seen = []

    def put(_, args, kwargs):
        state = args[0].repeat(len(points), 1, 1)  # here, for what comes before is one sequence
        state[:, pos] = points
        return (state, *args[1:]), kwargs

    def read(*given):
        output = given[-1]
        seen.append((output[0] if isinstance(output, tuple) else output)[:, pos])
        raise WasRead

    layers = model.model.layers
    hooks = [layers[layer].register_forward_pre_hook(put, with_kwargs=True), layers[layer + blocks - 1].register_forward_hook(read)]
    try:
        with torch.no_grad(), suppress(WasRead):
            model(tokens[None, : pos + 1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0].double().numpy()
