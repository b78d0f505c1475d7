"""A merger beside the baselines, at equal bytes, on the same windows; and what perplexity hides."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens.capture.passes import token_losses
from basin_lens.errors import MergeError
from basin_lens.merging.cache import generate
from basin_lens.merging.hook import TokenMerger
from basin_lens.merging.windows import Windows, batches, excess, fit_budget, plain_pass, share_left, surprisal_for
from basin_lens.model import (
    continuations,
    counting_memory,
    device_of,
    forward_pass,
    measuring,
    parameters_of,
    start_token,
    vocabulary_size,
)
from basin_lens.model import width as width_of
from basin_lens.values import Whole, whole_fields, whole_numbers

# What every policy is, in one line.
POLICIES = {
    "trained": "the trained merger, all thresholds moved together to the budget",
    "cosine": "the same without training: principal directions, thresholds by calibration",
    "mean": "as cosine, the representative is the running mean",
    "adjacent": "only with the cluster opened last",
    "random": "with a random earlier cluster",
    "stride": "evenly spaced tokens open clusters, the others join the last one",
    "recent": "first token and a recent window, the rest dropped (StreamingLLM)",
    "key norm": "keys of large norm dropped",
    "drop": "as cosine, but what would join is dropped",
}
SEEDED = ("random",)
# What these merge does not depend on the text, so that they can be given the bytes that another policy left on it.
BLIND = ("random", "stride", "recent")


@dataclass(frozen=True)
class Setting:
    """Where a policy is tried: `layers` that merge, `projection` width, `recent` window, and the budgets as shares of the full cache."""

    layers: tuple[int, ...]
    budgets: tuple[float, ...] = (0.75, 0.5)
    projection: Whole = 32
    recent: Whole = 8
    seeds: Whole = 5
    policies: tuple[str, ...] = tuple(POLICIES)

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        unknown = set(self.policies) - set(POLICIES)
        if unknown or not self.budgets or not all(0 < b < 1 for b in self.budgets) or self.seeds < 1:
            raise MergeError(f"expected policies of {', '.join(POLICIES)}, budgets between 0 and 1 and a seed or more, got {self}.")


def _make(policy: str, budget: float, seed: int, setting: Setting, merger: TokenMerger | None) -> TokenMerger:
    common: dict[str, Any] = {"recent": setting.recent, "target_bytes": budget, "seed": seed}
    # No floor: it is there for training, and would put budgets out of a baseline's reach.
    compared = common | {"projection": setting.projection, "floor": -1.0}
    if policy == "trained":
        assert merger is not None
        return merger
    kinds: dict[str, dict[str, Any]] = {
        "cosine": compared, "mean": compared | {"representative": "mean"}, "adjacent": compared | {"rule": "adjacent"},
        "random": common | {"rule": "random"}, "stride": common | {"rule": "stride"}, "key norm": common | {"rule": "key_norm", "drop": True},
        "drop": compared | {"drop": True},
    }  # fmt: skip
    return TokenMerger(list(setting.layers), **kinds[policy])


@dataclass(frozen=True)
class Compared:
    """What `compare_policies` found.

    Attributes:
        windows: a row per policy, budget, seed and held-out window.
        layers: a row per policy, budget, seed and merged layer: what is left of the tokens and of the cache, on the held-out windows.
        mergers: what was compared, as it was set, by policy and budget (the first seed).
    """

    windows: pd.DataFrame
    layers: pd.DataFrame
    mergers: Mapping[tuple[str, float], TokenMerger]


@whole_numbers(MergeError)
def recent_window(model: Any, budget: float, length: int, setting: Setting) -> TokenMerger:
    """First token plus the recent window that leaves `budget` of the cache, the rest dropped (StreamingLLM).

    The window is a number of tokens, right for sequences of `length`.
    """
    probe = TokenMerger(list(setting.layers), rule="all", drop=True).prepare(model)
    whole = probe.n_layers * length * probe.row_bytes
    left = budget * whole - (probe.n_layers - len(setting.layers)) * length * probe.row_bytes
    rows = int(left / len(setting.layers) / (probe.row_bytes + 4))
    if rows < 2:
        raise MergeError(
            f"expected a budget that leaves two rows in each merged layer, got {budget}. Ask for more, or merge in more layers."
        )
    return TokenMerger(list(setting.layers), rule="all", drop=True, recent=min(length, rows - 1))


def compare_policies(
    model: Any,
    calibration: Windows,
    held_out: Windows,
    setting: Setting,
    *,
    merger: TokenMerger | None = None,
    progress: bool = True,
) -> Compared:
    """Excess loss of every policy at every budget.

    Each is set to the budget on the calibration windows, and tested on the held-out ones. There, other texts leave a little more or less.
    The policies that do not look at the text (random, stride, recent) are therefore given the bytes that the first of the others (the trained
    merger, if there is one, else cosine) left on the held-out windows: equal bytes on the same texts, to 0.01 of the cache.

    Args:
        model: a hooked model.
        calibration: windows of the same length that nothing is tested on.
        held_out: windows to test on.
        setting: which policies, where, and how much of the cache.
        merger: a trained one, for the policy "trained"; without it that is left out. It is left as it was.
        progress: show a bar.

    Returns:
        a `Compared`. `windows`: the rows of `excess`, with `policy`, `budget` (share of the full cache aimed at), `seed`, `plain_seconds` (of the
        pass without merging, per token, measured once), `peak_bytes` and `plain_peak_bytes` (tensors made in one pass of the first windows,
        at most at one time), `flops` (`flops_share`). `layers`: the columns of `by_layer`.

    Raises:
        MergeError: windows of different lengths, documents or copies in both, or a budget out of reach.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> setting = bl.merging.Setting((20, 21), budgets=(0.98,), policies=("stride",))
        >>> found = bl.merging.compare_policies(model, *windows.apart(0.5), setting, progress=False)
        >>> found.windows.policy.unique().tolist()
        ['stride']
    """
    length = held_out.tokens.shape[1]
    if calibration.tokens.shape[1] != length:
        raise MergeError(f"expected windows of one length, got {calibration.tokens.shape[1]} and {length}.")
    if shared := set(calibration.doc) & set(held_out.doc):
        raise MergeError(f"expected documents of their own to test on, got {sorted(shared)[:3]} in both. Hold whole documents out.")
    if copied := held_out.without_copies_of(calibration)[1]:
        raise MergeError(
            f"expected texts of their own to test on, got {copied} of {len(held_out)} windows that are copies of calibration windows. "
            "Leave them out: held_out.without_copies_of(calibration)[0]."
        )
    plain = plain_pass(model, held_out)
    begun = time.perf_counter()
    with measuring(model):
        for rows in batches(held_out):
            forward_pass(model, held_out.tokens[rows].to(device_of(model)), {})[0, 0, 0].item()
    base = (time.perf_counter() - begun) / held_out.tokens.numel()
    plain_peak = _peak(None, model, held_out)
    parts, layers = [], []
    mergers: dict[tuple[str, float], TokenMerger] = {}
    # The trained one first: if a budget is out of its reach, that is said before hours went by. The blind ones last.
    order = {"trained": 0, "cosine": 1} | dict.fromkeys(BLIND, 3)
    plan = sorted((c for c in _cases(setting) if c[0] != "trained" or merger is not None), key=lambda c: order.get(c[0], 2))
    begun_raw = None if merger is None else merger.raw.detach().clone()
    left: dict[float, float] = {}
    for policy, budget, seed in tqdm(plan, desc="comparing policies", unit="case", disable=not progress):
        aim = min(left.get(budget, budget), 0.999) if policy in BLIND else budget
        made = recent_window(model, aim, length, setting) if policy == "recent" else _make(policy, aim, seed, setting, merger)
        if policy == "trained":
            fit_budget(made, model, calibration, budget)
        elif policy != "recent":
            made.calibrate(model, calibration.tokens.to(device_of(model)))
        rows_ = excess(made, model, held_out, plain)
        layers.append(by_layer(made.statistics()).assign(policy=policy, budget=budget, seed=seed))
        if policy not in BLIND:
            left.setdefault(budget, float(rows_["bytes_share"].mean()))
        parts.append(
            rows_.assign(
                policy=policy,
                budget=budget,
                seed=seed,
                plain_seconds=base,
                peak_bytes=_peak(made, model, held_out),
                plain_peak_bytes=plain_peak,
                flops=flops_share(made, model, rows_, length),
            )
        )
        mergers.setdefault((policy, budget), copy.deepcopy(made) if policy == "trained" else made)
        if policy == "trained" and begun_raw is not None:
            with torch.no_grad():
                made.raw.copy_(begun_raw)
    return Compared(pd.concat(parts, ignore_index=True), pd.concat(layers, ignore_index=True), mergers)


def by_layer(statistics: pd.DataFrame) -> pd.DataFrame:
    """Statistics of several passes as a row per merged layer.

    `rate` (merged / tokens), `tokens_kept` (rows left / tokens), `bytes_share` (of that layer's full cache), and sums and means of what
    `TokenMerger.statistics` tells.
    """
    sums = statistics.groupby("layer")[["tokens", "eligible", "merged", "clusters", "rows", "bytes", "full_bytes"]].sum()
    means = statistics.groupby("layer")[["level", "similarity", "state_error"]].mean()
    joined = sums.join(means).reset_index()
    return joined.assign(
        rate=joined["merged"] / joined["tokens"], tokens_kept=joined["rows"] / joined["tokens"],
        bytes_share=joined["bytes"] / joined["full_bytes"],
    )  # fmt: skip


def _cases(setting: Setting) -> Iterator[tuple[str, float, int]]:
    for budget in setting.budgets:
        for policy in setting.policies:
            for seed in range(setting.seeds if policy in SEEDED else 1):
                yield policy, budget, seed


def _peak(merger: TokenMerger | None, model: Any, windows: Windows) -> int:
    """Bytes of the tensors that one pass over the first windows makes, at most at one time."""
    tokens = windows.tokens[next(batches(windows))].to(device_of(model))
    if merger is None:
        with measuring(model), counting_memory() as memory:
            forward_pass(model, tokens, {})
        return memory.peak
    surprisal = surprisal_for(merger, model, tokens)
    with merger.attached(model, surprisal=surprisal), torch.no_grad(), counting_memory() as memory:
        forward_pass(model, tokens, {})
    merger.forget()
    return memory.peak


def flops_share(merger: TokenMerger, model: Any, rows: pd.DataFrame, length: int) -> float:
    """Arithmetic of one more token behind `length` others, clustering counted, over that of the plain model.

    Two per parameter of the blocks and per weight of the output matrix (looking up embeddings costs nothing), and four per head dimension and row
    read. Comparing costs two per number of each descriptor compared with, attention rows among them; a residual is expanded where it is
    read; tokens preserved by surprisal need the plain model's pass beside.
    """
    cfg, o, vocabulary = model.cfg, merger.options, vocabulary_size(model)
    tables = ("embed", "wte", "wpe", "lm_head")
    blocks = sum(
        p.numel() for name, p in parameters_of(model).items() if vocabulary not in p.shape and not any(t in name for t in tables)
    )  # fmt: skip
    weights = 2 * (blocks + vocabulary * width_of(model))
    attention = 4 * int(cfg.n_heads) * int(cfg.d_head) * length * merger.n_layers
    kept = 1 - float(rows["rate"].mean())
    merged = attention * (1 - len(o.layers) / merger.n_layers * (1 - kept))
    width = 0 if not o.compares else merger.center.shape[1] if merger.head is None else merger.head.shape[1]
    compared = (1 if o.rule == "adjacent" else kept * length) * (2 * width + (length if o.attention_weight else 0))
    project = 0 if merger.head is None else 2 * merger.head[0].numel()
    expand = 0 if merger.up is None else 2 * merger.up[0].numel() * kept * length
    plain = weights + attention
    return (weights + merged + len(o.layers) * (compared + project + expand)) / plain + (o.preserve == "surprisal")


def context_protocol(
    model: Any, calibration: Windows, held_out: Windows, setting: Setting, *, merger: TokenMerger | None = None
) -> pd.DataFrame:
    """The protocol "context": the first half of each window is merged at once, only what follows is scored.

    Here bipartite token merging (Bolya et al. 2023) has its place, which looks at all of the context before it decides. A budget is the share
    of the first half's rows that is left; a trained merger is moved, on the calibration windows, to the bytes that random merging leaves,
    and is missing where that is out of its reach.

    Raises:
        MergeError: a merger without thresholds, or windows that do not fit.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> setting = bl.merging.Setting((20,), budgets=(0.8,))
        >>> found = bl.merging.context_protocol(model, *windows.apart(0.5), setting)
        >>> found.policy.unique().tolist()
        ['bipartite', 'cosine', 'random']
    """
    length = held_out.tokens.shape[1]
    half = length // 2
    if merger is not None and not merger.options.learned:
        raise MergeError(f"expected a merger whose thresholds can be moved, got rule {merger.options.rule!r}. Leave it out.")
    plain = plain_pass(model, held_out)
    parts = []
    for budget in setting.budgets:
        made: dict[str, TokenMerger] = {}
        # Of the first half only, and no more than bipartite merging can: every other token.
        rate = min(0.48, 1 - budget) * half / length
        common: dict[str, Any] = {"recent": setting.recent, "target_rate": rate, "projection": setting.projection}
        made["bipartite"] = TokenMerger(list(setting.layers), rule="bipartite", representative="mean", **common)
        made["cosine"] = TokenMerger(list(setting.layers), floor=-1.0, **common)
        made["random"] = TokenMerger(list(setting.layers), rule="random", recent=setting.recent, target_rate=rate)
        for policy, each in made.items():
            each.calibrate(model, calibration.tokens.to(device_of(model)), context=half)
            rows = excess(each, model, held_out, plain, context=half)
            parts.append(rows.assign(policy=policy, budget=budget, context=half))
        if merger is None:
            continue
        own, share = merger.raw.detach().clone(), float(rows["bytes_share"].mean())
        try:
            fit_budget(merger, model, calibration, share, context=half)
            rows = excess(merger, model, held_out, plain, context=half)
            parts.append(rows.assign(policy="trained", budget=budget, context=half))
        except MergeError:
            continue
        finally:
            with torch.no_grad():
                merger.raw.copy_(own)
    return pd.concat(parts, ignore_index=True)


@whole_numbers(MergeError)
def induction_probe(
    model: Any, made: dict[str, TokenMerger], *, length: int = 48, sequences: int = 8, seed: int = 0
) -> pd.DataFrame:
    """Random tokens, then the same tokens again: can the second run still be copied from the first? Perplexity hardly sees it.

    Returns:
        a row per policy and sequence: `policy`, `sequence`, `loss` (nats per token of the second run), `plain_loss`, `excess`,
        `accuracy` (share of the second
        run's tokens that are the most likely one), `plain_accuracy`, `bytes_share`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> merger = bl.merging.TokenMerger([20], rule="stride", threshold=0.5)
        >>> len(bl.merging.induction_probe(model, {"stride": merger}, length=16, sequences=2))
        2
    """
    draw = torch.Generator(device="cpu").manual_seed(seed)
    half = torch.randint(10, vocabulary_size(model), (sequences, length), generator=draw)
    tokens = torch.cat([half[:, :1], half, half], 1).to(device_of(model))
    tokens[:, 0] = start_token(model)

    def second(logits: Tensor) -> tuple[Tensor, Tensor]:
        losses = token_losses(logits, tokens)[:, length + 1 :]
        right = (logits[:, length + 1 : -1].argmax(-1) == tokens[:, length + 2 :]).float()
        return losses.mean(1), right.mean(1)

    with measuring(model):
        plain = second(forward_pass(model, tokens, {}))
    rows: list[dict[str, Any]] = []
    for policy, merger in made.items():
        merger.forget()
        with merger.attached(model, surprisal=surprisal_for(merger, model, tokens)), torch.no_grad():
            loss, right = second(forward_pass(model, tokens, {}))
        share = share_left(merger, merger.statistics())
        rows += [
            {"policy": policy, "sequence": i, "loss": float(loss[i]), "plain_loss": float(plain[0][i]), "excess": float(loss[i] - plain[0][i]),
             "accuracy": float(right[i]), "plain_accuracy": float(plain[1][i]), "bytes_share": share}
            for i in range(sequences)
        ]  # fmt: skip
    return pd.DataFrame(rows)


@whole_numbers(MergeError)
def generation_quality(
    merger: TokenMerger, model: Any, prompts: Int[Tensor, "batch pos"], length: int, *, progress: bool = False
) -> pd.DataFrame:
    """Text written greedily with the compressed cache, beside the plain model's from the same prompts.

    Returns:
        a row per prompt and `cache` ("full", "compressed"): `text` ids as `tokens`, `base_loss` (nats per token: the plain model's loss on what was
        written), `repetition` (share of its 4-token runs that were there before), `bytes_share` (of the full cache at the end),
        `peak_bytes` (tensors made while writing, at most at one time, all prompts together).

    Raises:
        ModelError: a model whose cache cannot be rewritten.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20], rule="stride", threshold=0.5)
        >>> bl.merging.generation_quality(merger, model, windows.tokens[:1, :12], 8).cache.tolist()
        ['full', 'compressed']
    """
    with counting_memory() as memory:
        written, table = generate(merger, model, prompts, length, past_end=True, progress=progress)
    # The same steps over a cache that is never compressed: one pass over the prompt would take memory for all of its logits at once.
    with counting_memory() as plain_memory:
        generate(TokenMerger([0], threshold=1.0), model, prompts, length, past_end=True)
    plain = continuations(model, prompts, length)
    share = float(table["bytes"].sum() / table["full_bytes"].sum())
    rows: list[dict[str, Any]] = []
    for cache, text, held, peak in (("full", plain, 1.0, plain_memory.peak), ("compressed", written, share, memory.peak)):
        whole = torch.cat([prompts.cpu(), text], 1).to(device_of(model))
        with measuring(model):
            losses = token_losses(forward_pass(model, whole, {}), whole)[:, prompts.shape[1] - 1 :]
        rows += [
            {"prompt": i, "cache": cache, "tokens": text[i].tolist(), "base_loss": float(losses[i].mean()),
             "repetition": repetition(text[i].tolist()), "bytes_share": held, "peak_bytes": peak}
            for i in range(len(text))
        ]  # fmt: skip
    return pd.DataFrame(rows)


def repetition(tokens: Sequence[int], run: int = 4) -> float:
    """Share of the runs of so many tokens that came before in the same text; NaN for a text shorter than two runs."""
    runs = [tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else float("nan")


def merge_map(merger: TokenMerger, model: Any, tokens: Int[Tensor, "batch pos"]) -> pd.DataFrame:
    """Who merged into whom: a row per merged layer, sequence and token.

    Columns: `layer`, `seq`, `pos`, `token_id`, `leader` (place of the cluster's first token; its own place if it opened one or stayed
    raw), `merged`,
    `cluster_size` (tokens in its cluster at the end), `merged_layers` (share of the merged layers in which the token is merged).

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20], rule="stride", threshold=0.5)
        >>> table = bl.merging.merge_map(merger, model, windows.tokens[:1])
        >>> bool((table.leader[table.merged] < table.pos[table.merged]).all())
        True
    """
    merger.forget()
    tokens = tokens.to(device_of(model))
    with merger.attached(model, surprisal=surprisal_for(merger, model, tokens)), torch.no_grad():
        forward_pass(model, tokens, {})
        assert merger.pass_ is not None
        found = dict(merger.pass_.assigned)
    merger.forget()
    parts = []
    length = tokens.shape[1]
    for layer, a in found.items():
        joined = (a.joined & (a.since < length)).cpu().numpy()
        leader = np.where(joined & (a.leader.cpu().numpy() >= 0), a.leader.cpu().numpy(), np.arange(length))
        sizes = np.stack([np.bincount(row, minlength=length)[row] for row in leader])
        seq, pos = np.indices(joined.shape)
        parts.append(pd.DataFrame({
            "layer": layer, "seq": seq.ravel(), "pos": pos.ravel(), "token_id": tokens.cpu().numpy().ravel(), "leader": leader.ravel(),
            "merged": joined.ravel(), "cluster_size": sizes.ravel(),
        }))  # fmt: skip
    table = pd.concat(parts, ignore_index=True)
    return table.assign(merged_layers=table.groupby(["seq", "pos"])["merged"].transform("mean"))
