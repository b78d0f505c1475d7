"""A merger beside the baselines, at equal bytes, on the same windows."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from basin_lens.errors import MergeError
from basin_lens.merging.budgets import fit_budget
from basin_lens.merging.losses import excess, plain_pass, surprisal_for
from basin_lens.merging.parameters import Shape, shape_of
from basin_lens.merging.policies import POLICIES, Budget, Policy, compared_policies
from basin_lens.merging.policies.recent import RECENT
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.merging.windows import Windows, batches
from basin_lens.model import (
    HookedModel,
    counting_memory,
    device_of,
    forward_pass,
    measuring,
    parameters_of,
    query_width,
    vocabulary_size,
)
from basin_lens.model import width as width_of
from basin_lens.values import Whole, card, hides_bars, whole_fields, whole_numbers


@dataclass(frozen=True)
class Setting:
    """Where a policy is tried: `layers` that merge, `projection` width, `recent` window, and the budgets as shares of the full
    cache.
    """

    layers: tuple[int, ...]
    budgets: tuple[float, ...] = (0.75, 0.5)
    projection: Whole = 32
    recent: Whole = 8
    seeds: Whole = 5
    policies: tuple[str, ...] = tuple(compared_policies())

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        known = compared_policies()
        unknown = set(self.policies) - set(known)
        if unknown or not self.budgets or not all(0 < b < 1 for b in self.budgets) or self.seeds < 1:
            raise MergeError(f"expected policies of {', '.join(known)}, budgets between 0 and 1 and a seed or more, got {self}.")

    def budget(self, shape: Shape, share: float, length: int, seed: int) -> Budget:
        """What a policy is given to spend on sequences of `length` tokens."""
        return Budget(
            share=share,
            n_merged=len(self.layers),
            n_layers=shape.n_layers,
            row_bytes=shape.row_bytes,
            length=length,
            projection=self.projection,
            recent=self.recent,
            seed=seed,
        )

    def cases(self) -> Iterator[tuple[Policy, float, int]]:
        """Policy, budget and seed of each case."""
        for budget in self.budgets:
            for name in self.policies:
                for seed in range(self.seeds if POLICIES[name].seeded else 1):
                    yield POLICIES[name], budget, seed


@dataclass(frozen=True)
class Compared:
    """What `compare_policies` found.

    Attributes:
        windows: a row per policy, budget, seed and held-out window.
        layers: a row per policy, budget, seed and merged layer: what is left of the tokens and of the cache, on the held-out
            windows.
        mergers: what was compared, as it was set, by policy and budget (the first seed).
    """

    windows: pd.DataFrame
    layers: pd.DataFrame
    mergers: Mapping[tuple[str, float], TokenMerger]

    def __repr__(self) -> str:
        return f"Compared({', '.join(f'{what}: {fact}' for what, fact in self._said().items())})"

    def _repr_html_(self) -> str:
        means = self.windows.groupby(["policy", "budget"], sort=False)["excess"].mean().reset_index()
        names = [f"{policy} at {budget:g} of the cache" for policy, budget in zip(means["policy"], means["budget"], strict=True)]
        lines = {name: f"{mean:+.4f} nats/token" for name, mean in zip(names, means["excess"], strict=True)}
        return card("Compared: mean excess loss over held-out windows", {**lines, **self._said()})

    def _said(self) -> dict[str, str]:
        windows = self.windows.drop_duplicates(["doc", "window"])
        return {
            "policies": ", ".join(self.windows["policy"].unique()),
            "budgets": ", ".join(f"{budget:g}" for budget in self.windows["budget"].unique()),
            "windows": f"{len(windows)} of {windows['doc'].nunique()} documents",
        }


@whole_numbers(MergeError)
def recent_window(model: HookedModel, budget: float, length: int, setting: Setting) -> TokenMerger:
    """First token plus the recent window that leaves `budget` of the cache, the rest dropped (StreamingLLM).

    The window is a number of tokens, right for sequences of `length`.
    """
    return TokenMerger(setting.layers, **RECENT.options_for(setting.budget(shape_of(model), budget, length, seed=0)))


def compare_policies(
    model: HookedModel,
    calibration: Windows,
    held_out: Windows,
    setting: Setting,
    *,
    merger: TokenMerger | None = None,
    progress: bool = True,
) -> Compared:
    """Excess loss of every policy at every budget.

    Each is set to the budget on the calibration windows, and tested on the held-out ones. There, other texts leave a little more or
    less. The policies that do not look at the text (random, stride, recent) are therefore given the bytes that the first of the
    others (the trained merger, if there is one, else cosine) left on the held-out windows: equal bytes on the same texts, to 0.01
    of the cache.

    Args:
        model: a hooked model.
        calibration: windows of the same length that nothing is tested on.
        held_out: windows to test on.
        setting: which policies, where, and how much of the cache.
        merger: a trained one, for the policy "trained"; without it that is left out. It is left as it was.
        progress: show a bar.

    Returns:
        a `Compared`. `windows`: the rows of `excess`, with `policy`, `budget` (share of the full cache aimed at), `seed`,
        `plain_seconds` (of the pass without merging, per token, measured once), `peak_bytes` and `plain_peak_bytes` (tensors made
        in one pass of the first windows, at most at one time), `flops` (`flops_share`). `layers`: the columns of `by_layer`.

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
    _check_apart(calibration, held_out)
    length, shape = held_out.tokens.shape[1], shape_of(model)
    plain = plain_pass(model, held_out)
    plain_seconds, plain_peak = _plain_seconds(model, held_out), _peak(None, model, held_out)
    parts, layers = [], []
    mergers: dict[tuple[str, float], TokenMerger] = {}
    plan = sorted((c for c in setting.cases() if not c[0].trained or merger is not None), key=lambda c: c[0].turn)
    left: dict[float, float] = {}  # of the cache, by the first policy that looks at the text
    for policy, budget, seed in tqdm(plan, desc="comparing policies", unit="case", disable=hides_bars(progress)):
        aim = min(left.get(budget, budget), 0.999) if policy.blind else budget
        options = policy.options_for(setting.budget(shape, aim, length, seed))
        made = merger if policy.trained and merger is not None else TokenMerger(setting.layers, **options)
        with _at_budget(policy, made, model, calibration, aim):
            case: dict[str, str | int | float] = {"policy": policy.name, "budget": budget, "seed": seed}
            rows = excess(made, model, held_out, plain)
            layers.append(by_layer(made.statistics()).assign(**case))
            if not policy.blind:
                left.setdefault(budget, float(rows["bytes_share"].mean()))
            costs: dict[str, int | float] = {
                "plain_seconds": plain_seconds,
                "peak_bytes": _peak(made, model, held_out),
                "plain_peak_bytes": plain_peak,
                "flops": flops_share(made, model, rows, length),
            }
            parts.append(rows.assign(**case, **costs))
            mergers.setdefault((policy.name, budget), copy.deepcopy(made) if policy.trained else made)
    return Compared(pd.concat(parts, ignore_index=True), pd.concat(layers, ignore_index=True), mergers)


def _check_apart(calibration: Windows, held_out: Windows) -> None:
    """Refuse to test on what sets the budgets.

    Raises:
        MergeError: windows of different lengths, documents or copies in both.
    """
    if calibration.tokens.shape[1] != held_out.tokens.shape[1]:
        raise MergeError(f"expected windows of one length, got {calibration.tokens.shape[1]} and {held_out.tokens.shape[1]}.")
    if shared := set(calibration.doc) & set(held_out.doc):
        raise MergeError(f"expected documents of their own to test on, got {sorted(shared)[:3]} in both. Hold whole documents out.")
    if copied := held_out.without_copies_of(calibration)[1]:
        raise MergeError(
            f"expected texts of their own to test on, got {copied} of {len(held_out)} windows that are copies of calibration "
            "windows. Leave them out: held_out.without_copies_of(calibration)[0]."
        )


@contextmanager
def _at_budget(policy: Policy, merger: TokenMerger, model: HookedModel, calibration: Windows, share: float) -> Iterator[None]:
    """Set a merger to a share of the cache on the calibration windows; a trained one is as it was afterwards."""
    if not policy.trained:
        if policy.calibrated:
            merger.calibrate(model, calibration.tokens.to(device_of(model)))
        yield
        return
    begun = merger.weights.raw.detach().clone()
    try:
        fit_budget(merger, model, calibration, share)
        yield
    finally:
        with torch.no_grad():
            merger.weights.raw.copy_(begun)


def by_layer(statistics: pd.DataFrame) -> pd.DataFrame:
    """Statistics of several passes as a row per merged layer.

    `rate` (merged / tokens), `tokens_kept` (rows left / tokens), `bytes_share` (of that layer's full cache), and sums and means of
    what `TokenMerger.statistics` tells.
    """
    sums = statistics.groupby("layer")[["tokens", "eligible", "merged", "clusters", "rows", "bytes", "full_bytes"]].sum()
    means = statistics.groupby("layer")[["level", "similarity", "state_error"]].mean()
    joined = sums.join(means).reset_index()
    return joined.assign(
        rate=joined["merged"] / joined["tokens"],
        tokens_kept=joined["rows"] / joined["tokens"],
        bytes_share=joined["bytes"] / joined["full_bytes"],
    )


def _plain_seconds(model: HookedModel, windows: Windows) -> float:
    """Time of the pass without merging, per token."""
    begun = time.perf_counter()
    with measuring(model):
        for rows in batches(windows):
            forward_pass(model, windows.tokens[rows].to(device_of(model)), {})[0, 0, 0].item()  # waits for the device
    return (time.perf_counter() - begun) / windows.tokens.numel()


def _peak(merger: TokenMerger | None, model: HookedModel, windows: Windows) -> int:
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


def flops_share(merger: TokenMerger, model: HookedModel, rows: pd.DataFrame, length: int) -> float:
    """Arithmetic of one more token behind `length` others, clustering counted, over that of the plain model.

    Two per parameter of the blocks and per weight of the output matrix (looking up embeddings costs nothing), and four per head
    dimension and row read. Comparing costs two per number of each descriptor compared with, attention rows among them; a residual
    is expanded where it is read; tokens preserved by surprisal need the plain model's pass beside.
    """
    o, vocabulary, shape = merger.options, vocabulary_size(model), merger.weights.shape
    tables = ("embed", "wte", "wpe", "lm_head")
    blocks = sum(
        parameter.numel()
        for name, parameter in parameters_of(model).items()
        if vocabulary not in parameter.shape and not any(table in name for table in tables)
    )
    weights = 2 * (blocks + vocabulary * width_of(model))
    attention = 4 * query_width(model) * length * shape.n_layers
    kept = 1 - float(rows["rate"].mean())
    merged = attention * (1 - len(o.layers) / shape.n_layers * (1 - kept))
    numbers = 2 * merger.weights.compared_width + (length if o.attention_weight else 0)
    compared = (1 if o.decision.last_only else kept * length) * numbers
    project = 0 if merger.weights.head is None else 2 * merger.weights.head[0].numel()
    expand = 0 if merger.weights.up is None else 2 * merger.weights.up[0].numel() * kept * length
    plain = weights + attention
    return (weights + merged + len(o.layers) * (compared + project + expand)) / plain + (o.preserve == "surprisal")


def context_protocol(
    model: HookedModel, calibration: Windows, held_out: Windows, setting: Setting, *, merger: TokenMerger | None = None
) -> pd.DataFrame:
    """The protocol "context": the first half of each window is merged at once, only what follows is scored.

    Here bipartite token merging (Bolya et al. 2023) has its place, which looks at all of the context before it decides. A budget is
    the share of the first half's rows that is left; a trained merger is moved, on the calibration windows, to the bytes that random
    merging leaves, and is missing where that is out of its reach.

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
    if merger is not None and not merger.options.decision.learned:
        raise MergeError(f"expected a merger whose thresholds can be moved, got rule {merger.options.rule!r}. Leave it out.")
    plain = plain_pass(model, held_out)
    parts = []
    for budget in setting.budgets:
        made: dict[str, TokenMerger] = {}
        # Of the first half only, and no more than bipartite merging can: every other token.
        rate = min(0.48, 1 - budget) * half / length
        common: dict[str, object] = {"recent": setting.recent, "target_rate": rate, "projection": setting.projection}
        made["bipartite"] = TokenMerger(list(setting.layers), rule="bipartite", representative="mean", **common)
        made["cosine"] = TokenMerger(list(setting.layers), floor=-1.0, **common)
        made["random"] = TokenMerger(list(setting.layers), rule="random", recent=setting.recent, target_rate=rate)
        for policy, each in made.items():
            each.calibrate(model, calibration.tokens.to(device_of(model)), context=half)
            rows = excess(each, model, held_out, plain, context=half)
            parts.append(rows.assign(policy=policy, budget=budget, context=half))
        if merger is None:
            continue
        own, share = merger.weights.raw.detach().clone(), float(rows["bytes_share"].mean())
        try:
            fit_budget(merger, model, calibration, share, context=half)
            rows = excess(merger, model, held_out, plain, context=half)
            parts.append(rows.assign(policy="trained", budget=budget, context=half))
        except MergeError:
            continue
        finally:
            with torch.no_grad():
                merger.weights.raw.copy_(own)
    return pd.concat(parts, ignore_index=True)
