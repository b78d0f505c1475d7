"""Simulated tables in which two columns share nothing but their controls (or, asked for, share an effect of known size).

One layer of a table is one draw: a statistic that takes a table tests all draws in one call. Every maker takes a `Data` and returns a table with
`layer, doc, seq, pos, token_id, x, y` and controls `c0` (and `c1`), and those of groups also `group`: y cut in two, or `tag`: y cut in three.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

DISTRIBUTIONS = ("normal", "lognormal", "heavy tails")
NOISE = 0.5  # standard deviation of what x and y have of their own, beside controls of standard deviation 1 (lognormal: 2.2, heavy tails: 1.7)


@dataclass(frozen=True)
class Data:
    """What x and y are made of.

    Attributes:
        distribution: of the controls; of x and y where there are none.
        levels: whether texts (of tokens) have levels of their own, in the controls, or sequences and tokens (of units) in the scores.
        shape: how x and y hang on the controls, see `SHAPES`.
        effect: correlation of what x and y have of their own; 0: no effect.
        noise: standard deviation of it.
    """

    distribution: str
    levels: bool
    shape: str
    effect: float = 0.0
    noise: float = NOISE

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.distribution}, {'text levels' if self.levels else 'no level'}, {self.shape}"


# What is right: "alpha": no more false positives than the level; "refused": NaN, and a note that the controls explain it in full.
SHAPES = {
    "straight": "alpha",  # x = c + noise, y = c + noise
    "bent": "alpha",  # the same of the square of the control (of its logarithm or inverse hyperbolic sine where tails are long)
    "two controls": "alpha",  # x = c0 + c1 + noise, y = c0 + c1 + noise
    "constant control": "alpha",
    "copy": "refused",  # c = 2 x + 5, y = x / 2 + noise
    "monotone copy": "alpha or refused",  # c = a bent function of x: for ranks, x itself
    "sum of controls": "refused",  # x = c0 + c1, y = x / 2 + noise
    "same text four times": "alpha",  # 12 distinct texts of 48; straight
    "sampled in groups": "alpha",  # straight; x as compression is: of two tokens in five, its noise the interaction of groups over texts
}
GROUP, SAMPLED = 4, 0.4  # tokens of a group, each of another text; share of tokens that have a score


def latent(rng: np.random.Generator, distribution: str, shape: tuple[int, ...]) -> np.ndarray:
    """Independent values before their distribution is bent: see `values`."""
    return rng.standard_t(3, shape) if distribution == "heavy tails" else rng.normal(size=shape)


def values(distribution: str, drawn: np.ndarray) -> np.ndarray:
    """Latent values as the control holds them."""
    return np.exp(drawn) if distribution == "lognormal" else drawn


def bend(distribution: str, drawn: np.ndarray) -> np.ndarray:
    """A smooth function of the control that no straight line follows, standard deviation about 1."""
    held = np.arcsinh(drawn) if distribution == "heavy tails" else drawn
    squared = held**2
    return (squared - squared.mean()) / squared.std()


def monotone(distribution: str, held: np.ndarray) -> np.ndarray:
    """The same order, other values."""
    return {"normal": lambda v: np.exp(v / 2), "lognormal": np.cbrt, "heavy tails": np.arcsinh}[distribution](held)


def interactions(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Of crossed tables of independent numbers, one for every four texts at each token: what is of one group hangs together."""
    draws, texts, tokens = shape
    c = rng.normal(size=(draws, texts // GROUP, tokens, GROUP, GROUP))
    home = np.diagonal(c, axis1=3, axis2=4)
    place, directions = ((c.sum(axis) - home) / (GROUP - 1) for axis in (4, 3))
    away = (c.sum((3, 4)) - home.sum(3))[..., None] - (GROUP - 1) * (place + directions)
    values_ = home - place - directions + away / ((GROUP - 1) * (GROUP - 2))
    order = rng.permuted(np.tile(np.arange(texts)[:, None], (draws, 1, tokens)), axis=1)
    return np.take_along_axis((values_ / np.sqrt(11 / 6)).swapaxes(2, 3).reshape(shape), order, axis=1)


def pair(data: Data, rng: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """x, y and controls, each [draws, texts, tokens]; levels are of texts."""

    def control() -> np.ndarray:
        drawn = latent(rng, data.distribution, shape)
        return drawn + rng.normal(size=(*shape[:2], 1)) if data.levels else drawn

    grouped = data.shape == "sampled in groups"
    own = interactions(rng, shape) if grouped and shape[1] > 1 else rng.normal(size=shape)
    one, other = data.noise * own, data.noise * (data.effect * own + np.sqrt(1 - data.effect**2) * rng.normal(size=shape))
    first, second = control(), control()
    c = values(data.distribution, first)
    if grouped:
        scored = rng.random(shape) < (SAMPLED if shape[1] > 1 else 1)
        return {"x": np.where(scored, c + one, np.nan), "y": c + other, "c0": c}
    if data.shape in ("straight", "same text four times"):
        return {"x": c + one, "y": c + other, "c0": c}
    if data.shape == "bent":
        bent = bend(data.distribution, first)
        return {"x": bent + one, "y": bent + other, "c0": c}
    if data.shape == "constant control":
        return {"x": c, "y": values(data.distribution, second), "c0": np.full(shape, 3.0)}
    if data.shape == "copy":
        return {"x": c, "y": c / 2 + rng.normal(size=shape), "c0": 2 * c + 5}
    if data.shape == "monotone copy":
        return {"x": c, "y": c / 2 + rng.normal(size=shape), "c0": monotone(data.distribution, c)}
    both = c + values(data.distribution, second)
    controls = {"c0": c, "c1": both - c}
    if data.shape == "two controls":
        return {"x": both + one, "y": both + other, **controls}
    return {"x": both, "y": both / 2 + rng.normal(size=shape), **controls}


def controls_of(data: Data) -> list[str]:
    """Names of the control columns."""
    return ["c0", "c1"] if data.shape in ("two controls", "sum of controls") else ["c0"]


def bare(data: Data, rng: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """x and y that share nothing at all, not even controls, each with levels of its own."""
    held = {}
    for name in ("x", "y", "z"):
        drawn = latent(rng, data.distribution, shape)
        held[name] = values(data.distribution, drawn) + (rng.normal(size=(*shape[:2], 1)) if data.levels else 0.0)
    held["y"] = held["y"] + data.effect * held["x"]
    held["difference"] = held["x"] - held["z"] + data.effect  # symmetric around the effect, whatever the distribution
    return held


def table_of(columns: dict[str, np.ndarray], rng: np.random.Generator, repeats: int = 1, sequences: int = 1) -> pd.DataFrame:
    """Columns [draws, texts, tokens] as a table, every text `repeats` times under names of its own, tokens in so many sequences."""
    draws, texts, tokens = next(iter(columns.values())).shape
    ids = np.tile(rng.integers(0, 60, (texts, tokens)), (repeats, 1))
    held = {name: np.tile(column, (1, repeats, 1)).ravel() for name, column in columns.items()}
    doc, pos = np.divmod(np.arange(repeats * texts * tokens), tokens)
    length = -(-tokens // sequences)
    fixed = {"doc": doc, "seq": doc * sequences + pos // length, "pos": pos % length, "token_id": ids.ravel()}
    return pd.DataFrame(
        {"layer": np.repeat(np.arange(draws), len(doc)), **{k: np.tile(v, draws) for k, v in fixed.items()}, **held}
    )


def _repeats(data: Data, texts: int) -> tuple[int, int]:
    return (12, 4) if data.shape == "same text four times" else (texts, 1)


def of_tokens(data: Data, draws: int, seed: int) -> pd.DataFrame:
    """20 texts of 40 tokens."""
    rng = np.random.default_rng(seed)
    texts, repeats = _repeats(data, 20)
    return table_of(pair(data, rng, (draws, texts, 40)), rng, repeats)


def bare_tokens(data: Data, draws: int, seed: int) -> pd.DataFrame:
    """20 texts of 40 tokens, nothing in common; each token belongs to a group at random."""
    rng = np.random.default_rng(seed)
    texts, repeats = _repeats(data, 20)
    held = bare(data, rng, (draws, texts, 40))
    return cut_tokens(table_of(held, rng, repeats))


def cut_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """`group`: whether y is above its median in the text; `tag`: the third of the text that it is in."""
    place = table.groupby(["layer", "doc"], sort=False)["y"].rank(pct=True)
    table["group"] = place > 0.5
    table["tag"] = np.array(["A", "B", "C"])[np.clip(np.ceil(place.to_numpy() * 3).astype(int) - 1, 0, 2)]
    return table


def grouped_tokens(data: Data, draws: int, seed: int) -> pd.DataFrame:
    """Tokens told apart by y within each text: kinds that the control knows as well as it knows the score."""
    return cut_tokens(of_tokens(data, draws, seed))


def of_types(data: Data, draws: int, seed: int) -> pd.DataFrame:
    """Each of 60 token types has a score of its own and one tag of three, which mean nothing in other words: what fools a test over tokens.

    With levels, every text has differences between tags of its own, which mean nothing in other texts.
    """
    table = of_tokens(data, draws, seed)
    rng = np.random.default_rng([seed, 1])
    table["x"] = table["x"] + rng.normal(0, 0.7, (draws, 60))[table["layer"], table["token_id"]]
    if data.levels:
        table["x"] = (
            table["x"] + rng.normal(0, 0.7, (draws, table["doc"].max() + 1, 3))[table["layer"], table["doc"], table["token_id"] % 3]
        )
    table["tag"] = np.array(["A", "B", "C"])[table["token_id"] % 3]
    return table


def of_units(data: Data, draws: int, seed: int, texts: int = 48) -> pd.DataFrame:
    """48 texts told apart by y: `group`, half of them. One sequence of six tokens; with levels two, which differ in x."""
    rng = np.random.default_rng(seed)
    texts, repeats = _repeats(data, texts)
    flat = Data(data.distribution, False, data.shape, data.effect, data.noise)
    held = {name: column.transpose(0, 2, 1) for name, column in pair(flat, rng, (draws, 1, texts)).items()}
    return _units(data, held, rng, repeats)


def bare_units(data: Data, draws: int, seed: int) -> pd.DataFrame:
    """The same with nothing in common."""
    rng = np.random.default_rng(seed)
    texts, repeats = _repeats(data, 48)
    flat = Data(data.distribution, False, data.shape, data.effect)
    return _units(data, bare(flat, rng, (draws, texts, 1)), rng, repeats)


def _units(data: Data, held: dict[str, np.ndarray], rng: np.random.Generator, repeats: int) -> pd.DataFrame:
    held["group"] = held["y"] > np.median(held["y"], 1, keepdims=True)
    held = {name: np.repeat(column, 6 * (1 + data.levels), 2) for name, column in held.items()}
    if not data.levels:
        return table_of(held, rng, repeats)
    # Off the text's own value in both sequences alike: the mean over sequences of means over tokens is that value.
    for name in {"x", "z"} & set(held):
        off = rng.normal(size=held[name].shape)
        held[name] = held[name] + off - off.mean(2, keepdims=True)
    return table_of(held, rng, repeats, sequences=2)


Maker = Callable[[Data, int, int], pd.DataFrame]
