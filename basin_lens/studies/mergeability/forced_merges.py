"""What it costs to merge one token, and what it costs to merge many when something decides which: passes with forced merges."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens.capture import Capture
from basin_lens.capture.passes import TOKENS_PER_PASS, token_losses
from basin_lens.merging import TokenMerger
from basin_lens.model import HookedModel, device_of, forward_pass, measuring
from basin_lens.studies.framework.measured_texts import HEADLINE
from basin_lens.values import hides_bars

# So many losses at least must be able to feel a merge: the last tokens of a sequence would cost nothing, whoever they are.
LATER = 12
# Calibration is one pass over one batch, and the vocabulary is wide: 2,048 tokens of SmolLM2 are 400 MB of logits.
CALIBRATION_TOKENS = 2048
# Below every score, and finite: a quantile of scores is interpolated.
UNSCORED = -1e9
NOTHING = 0  # a place that is never merged, so: a row without any merge

# Who chooses the tokens to merge: rule of the merger, and whether it is drawn at random.
CHOICES = {
    "cosine": ("cosine", False),
    "low surprisal": ("score", False),
    "high compression": ("score", False),
    "random choice": ("score", True),
    "random": ("random", True),
}


@dataclass(frozen=True)
class Setting:
    """Where and how is merged: a model, texts, layers, and the window of tokens that stay raw.

    `calibration`: the sequences by which states are centered and levels are set, few enough for one pass.
    """

    model: HookedModel
    capture: Capture
    layers: list[int]
    window: int
    seed: int
    calibration: list[int]
    progress: bool = False


@dataclass(frozen=True)
class Costs:
    """`table`: a row per layer and forced merge. `rounding`: the largest change in nats of a loss where nothing was merged."""

    table: pd.DataFrame
    rounding: float


def able_places(length: int, window: int) -> range:
    """Places that can be merged: there is a cluster to join, and at least `LATER` losses come from queries that read it."""
    return range(2, length - window - LATER)


def draw_places(capture: Capture, scored: pd.DataFrame, *, most: int, fewest: int, window: int, seed: int) -> dict[int, list[int]]:
    """Places to merge in each sequence, among those with a score; sequences with too few of them are left out.

    Args:
        capture: the texts.
        scored: `seq` and `pos` of the tokens that have one.
        most: places per sequence, at most.
        fewest: places that a sequence must have.
        window: see `able_places`.
        seed: of the draw, which depends on the sequence's own tokens alone.
    """
    held = {int(str(seq)): set(part["pos"].tolist()) for seq, part in scored.groupby("seq")}
    drawn = {}
    for seq, sequence in enumerate(capture.sequences):
        able = [place for place in able_places(len(sequence.tokens), window) if place in held.get(seq, set())]
        if len(able) >= fewest:
            rng = np.random.default_rng([seed, *sequence.tokens])
            drawn[seq] = sorted(rng.choice(able, min(most, len(able)), replace=False).tolist())
    return drawn


def draw_calibration(capture: Capture, sequences: Sequence[int], seed: int) -> list[int]:
    """Some of these sequences, in a seeded order, as many as one pass may have; at least one."""
    chosen: list[int] = []
    for seq in np.random.default_rng(seed).permutation(list(sequences)).tolist():
        longest = max(len(capture.sequences[one].tokens) for one in [*chosen, seq])
        if chosen and longest * (len(chosen) + 1) > CALIBRATION_TOKENS:
            break
        chosen.append(seq)
    return sorted(chosen)


# ---- one token at a time --------------------------------------------------------------------------------------------------------


# Columns of one merge.
_COSTS = [
    "layer",
    "seq",
    "pos",
    "merge_cost",
    "merge_change",
    "merge_similarity",
    "leader_pos",
    "leader_is_same_token",
    "losses_behind",
]


def forced_costs(setting: Setting, places: Mapping[int, Sequence[int]]) -> Costs:
    """Merge single tokens, each alone and in one layer alone, into the most similar earlier token.

    merge_cost = sum of the losses of all later tokens with this merge, less the same sum of the plain pass, in nats

    merge_change = sum over the same predictions of KL(plain || with this merge), in nats: how much it changes, for better or worse

    Rows of one batch are copies of sequences with a merge of their own each, and one copy without. Only queries that come `window`
    or more tokens behind the merged one read it through its leader, so only what they predict counts; padding never does.

    Args:
        setting: see there.
        places: of each sequence.

    Returns:
        a table with `layer, seq, pos, merge_cost, merge_change, merge_similarity` (cosine with the leader, of the centered states
        that enter the layer), `leader_pos`, `leader_is_same_token` (1 or 0), `losses_behind` (how many losses the cost sums over).
    """
    capture, layers = setting.capture, setting.layers
    plain = plain_losses(setting, sorted(places))
    centers = _forcing(layers, setting.window)
    tokens, valid = _batch(setting, setting.calibration)
    centers.calibrate(setting.model, tokens, valid=valid)
    lines, rounding = [], 0.0
    jobs = [(seq, place) for seq in sorted(places) for place in places[seq]]
    with tqdm(total=len(layers) * len(jobs), desc="forced merges", unit="merge", disable=hides_bars(setting.progress)) as bar:
        for index, layer in enumerate(layers):
            merger = _forcing([layer], setting.window).prepare(setting.model)
            merger.weights.center.copy_(centers.weights.center[index : index + 1])
            for part in in_passes([len(capture.sequences[seq].tokens) for seq, _ in jobs]):
                alike = [(seq, NOTHING) for seq in dict.fromkeys(jobs[at][0] for at in part)]
                for found in _forced(setting, merger, layer, [*alike, *(jobs[at] for at in part)]):
                    ids, first = capture.sequences[found.seq].tokens, found.first
                    rise = found.losses[1 : len(ids)] - plain[found.seq][1:]
                    if found.place == NOTHING:
                        rounding = max(rounding, float(np.abs(rise).max()))
                        continue
                    cost, same = float(rise[first - 1 :].sum()), float(ids[found.leader] == ids[found.place])
                    row = (layer, found.seq, found.place, cost, found.change, found.similarity, found.leader, same)
                    lines.append((*row, len(ids) - first))
                bar.update(len(part))
    return Costs(pd.DataFrame(lines, columns=_COSTS).sort_values(["layer", "seq", "pos"], ignore_index=True), rounding)


@dataclass(frozen=True)
class _Forced:
    """One row. `first`: the token that the first query to read the cluster predicts."""

    seq: int
    place: int
    first: int
    losses: Float[np.ndarray, " pos"]
    change: float
    leader: int
    similarity: float


def _forcing(layers: list[int], window: int) -> TokenMerger:
    """Merges what has a score of 1, and nothing else."""
    return TokenMerger(layers, rule="score", threshold=0.5, recent=window)


def _forced(setting: Setting, merger: TokenMerger, layer: int, jobs: Sequence[tuple[int, int]]) -> list[_Forced]:
    """One pass: each row's losses when its one token is merged, and with which; each sequence has a row without a merge, too."""
    tokens, valid = _batch(setting, [seq for seq, _ in jobs])
    rows = torch.arange(len(jobs), device=tokens.device)
    places = torch.tensor([place for _, place in jobs], device=tokens.device)
    scores = torch.zeros(tokens.shape, device=tokens.device)
    scores[rows, places] = (places != NOTHING).float()
    with merger.attached(setting.model, valid=valid, scores={layer: scores}):
        logits = _logits(setting.model, tokens)
        assert merger.pass_ is not None
        leaders, units = merger.pass_.assigned[layer].leader[rows, places], merger.pass_.units[layer].double()
    merger.forget()  # a row of statistics per pass is of no use here
    cosine = torch.nn.functional.cosine_similarity(units[rows, places], units[rows, leaders.clamp(min=0)], dim=-1)
    losses = _losses(logits, tokens, valid)
    bare = {seq: row for row, (seq, place) in enumerate(jobs) if place == NOTHING}
    found = []
    for row, (seq, place) in enumerate(jobs):
        first = place + setting.window + 1
        there = slice(first - 1, int(valid[row].sum()) - 1)
        change = 0.0 if place == NOTHING else _divergence(logits[bare[seq], there], logits[row, there])
        found.append(_Forced(seq, place, first, losses[row], change, int(leaders[row]), float(cosine[row])))
    return found


def _divergence(plain: Float[Tensor, "pos vocab"], other: Float[Tensor, "pos vocab"]) -> float:
    """Sum of KL(plain || other) over positions, nats. In double: what two nearly equal distributions differ by is small."""
    p, q = (logits.double().log_softmax(-1) for logits in (plain, other))
    return max(0.0, float((p.exp() * (p - q)).sum()))


# ---- many tokens at once --------------------------------------------------------------------------------------------------------


def score_grid(table: pd.DataFrame, capture: Capture, column: str) -> dict[int, Float[np.ndarray, "seqs pos"]]:
    """A column of the token table by layer, as sequences by positions; `UNSCORED` where there is no value."""
    grids = {}
    for layer, part in table.groupby("layer"):
        grid = np.full(tuple(capture.valid.shape), np.nan)
        grid[part["seq"].to_numpy(), part["pos"].to_numpy()] = part[column].to_numpy(float)
        grids[int(str(layer))] = np.nan_to_num(grid, nan=UNSCORED)
    return grids


def policy_losses(
    setting: Setting, tested: Sequence[int], table: pd.DataFrame, *, shares: Sequence[float], n_random: int
) -> pd.DataFrame:
    """Merge the same share of the tokens in all layers at once, chosen by each of `CHOICES`.

    Levels are set on the calibration sequences, so that this share of the tokens that can be merged joins in every layer.

    Args:
        setting: see there.
        tested: other sequences.
        table: token table with `surprisal` and the headline score.
        shares: of the tokens that can be merged: all but the first and those of the recent window.
        n_random: draws of the random policies.

    Returns:
        one row per policy, share, draw and sequence: `merge_excess` (mean loss with merging less without, nats per token, over
        `n_tokens`), `merged_share` (of the tokens that could be, mean over layers).
    """
    surprisal = score_grid(table, setting.capture, "surprisal")
    grids = {
        "low surprisal": {layer: np.where(grid == UNSCORED, UNSCORED, -grid) for layer, grid in surprisal.items()},
        "high compression": score_grid(table, setting.capture, HEADLINE),
    }
    plain = plain_losses(setting, tested)
    runs = [
        (share, policy, draw)
        for share in shares
        for policy, (_, by_chance) in CHOICES.items()
        for draw in range(n_random if by_chance else 1)
    ]
    lines: list[dict[str, object]] = []
    for share, policy, draw in tqdm(runs, desc="merging policies", unit="run", disable=hides_bars(setting.progress)):
        grid = _chance(setting, draw) if policy == "random choice" else grids.get(policy)
        merger = _calibrated(setting, CHOICES[policy][0], share, grid, draw)
        lines += [
            {"policy": policy, "share": share, "draw": draw, **line} for line in _merged(setting, merger, tested, grid, plain)
        ]
    return pd.DataFrame(lines)


def _chance(setting: Setting, draw: int) -> dict[int, Float[np.ndarray, "seqs pos"]]:
    """Scores that mean nothing, others in each layer."""
    shape = tuple(setting.capture.valid.shape)
    return {layer: np.random.default_rng([setting.seed, draw, layer]).random(shape) for layer in setting.layers}


def _calibrated(setting: Setting, rule: str, share: float, grid: Mapping[int, np.ndarray] | None, draw: int) -> TokenMerger:
    tokens, valid = _batch(setting, setting.calibration)
    offered = int((valid.sum(1) - 1 - setting.window).clamp(min=0).sum())
    merger = TokenMerger(
        setting.layers, rule=rule, target_rate=share * offered / int(valid.sum()), recent=setting.window, seed=setting.seed + draw
    )
    return merger.calibrate(setting.model, tokens, valid=valid, scores=_rows(grid, setting.calibration, tokens))


def _merged(
    setting: Setting,
    merger: TokenMerger,
    tested: Sequence[int],
    grid: Mapping[int, np.ndarray] | None,
    plain: Mapping[int, np.ndarray],
) -> Iterator[dict[str, object]]:
    """Each sequence's excess loss."""
    lengths = [len(setting.capture.sequences[seq].tokens) for seq in tested]
    for part in in_passes(lengths):
        chosen = [tested[at] for at in part]
        tokens, valid = _batch(setting, chosen)
        with merger.attached(setting.model, valid=valid, scores=_rows(grid, chosen, tokens)):
            losses = losses_of(setting.model, tokens, valid)
            assert merger.pass_ is not None
            joined = torch.stack([merger.pass_.assigned[layer].joined for layer in setting.layers]).float().cpu().numpy()
        merger.forget()
        for row, seq in enumerate(chosen):
            length = len(setting.capture.sequences[seq].tokens)
            able = slice(1, length - setting.window)
            excess = float((losses[row, 1:length] - plain[seq][1:]).mean())
            merged = float(joined[:, row, able].mean())
            yield {"seq": seq, "n_tokens": length - 1, "merge_excess": excess, "merged_share": merged}


def _rows(grid: Mapping[int, np.ndarray] | None, sequences: Sequence[int], tokens: Tensor) -> dict[int, Tensor] | None:
    """The scores of a batch."""
    if grid is None:
        return None
    return {layer: torch.from_numpy(held[list(sequences), : tokens.shape[1]]).to(tokens.device) for layer, held in grid.items()}


# ---- passes ---------------------------------------------------------------------------------------------------------------------


def plain_losses(setting: Setting, sequences: Sequence[int]) -> dict[int, Float[np.ndarray, " pos"]]:
    """-log p of each token given those before it, nats, by sequence; NaN at position 0."""
    answer = {}
    lengths = [len(setting.capture.sequences[seq].tokens) for seq in sequences]
    for part in in_passes(lengths):
        tokens, valid = _batch(setting, [sequences[at] for at in part])
        for at, losses in zip(part, losses_of(setting.model, tokens, valid), strict=True):
            answer[sequences[at]] = losses[: lengths[at]]
    return answer


def losses_of(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch pos"]:
    """-log p of each token given those before it, nats; NaN at position 0 and for padding."""
    return _losses(_logits(model, tokens), tokens, valid)


def _logits(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    with measuring(model):
        return forward_pass(model, tokens, {})


def _losses(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], valid: Bool[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch pos"]:
    losses = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
    for row in range(len(tokens)):  # a sequence at a time: the vocabulary is wide
        losses[row, 1:] = token_losses(logits[row][None], tokens[row][None])[0].double()
    losses[~valid] = torch.nan
    return losses.cpu().numpy()


def in_passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like length, about 1,000 tokens at a time."""
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    while order:
        size = max(1, TOKENS_PER_PASS // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _batch(setting: Setting, sequences: Sequence[int]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens padded on the right, and which are real. A sequence may stand there several times."""
    rows = [setting.capture.sequences[seq].tokens for seq in sequences]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    valid = torch.zeros(tokens.shape, dtype=torch.bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row)], valid[at, : len(row)] = torch.tensor(row), True
    device = device_of(setting.model)
    return tokens.to(device), valid.to(device)
