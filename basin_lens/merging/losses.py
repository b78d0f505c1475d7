"""What a merger costs on some windows of text: losses with merging beside those of the plain model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture.passes import token_losses
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.merging.windows import Windows, batches
from basin_lens.model import HookedModel, device_of, forward_pass, measuring


@dataclass(frozen=True)
class Plain:
    """What the plain model says of some windows: losses, most likely tokens; log probabilities pass by pass, in float16."""

    losses: Float[Tensor, "batch predicted"]
    best: Int[Tensor, "batch pos"]
    logits: tuple[Tensor, ...]


def plain_pass(model: HookedModel, windows: Windows, *, keep: bool = True) -> Plain:
    """Losses (nats) and, with `keep`, the logits of the model without merging; 2 bytes x vocabulary per token of memory.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> tuple(bl.merging.plain_pass(model, windows, keep=False).losses.shape)
        (4, 31)
    """
    losses, best, logits = [], [], []
    with measuring(model):
        for rows in batches(windows):
            tokens = windows.tokens[rows].to(device_of(model))
            made = forward_pass(model, tokens, {})
            losses.append(token_losses(made, tokens))
            best.append(made.argmax(-1))
            if keep:
                logits.append(made.log_softmax(-1).half())
    return Plain(torch.cat(losses), torch.cat(best), tuple(logits))


def excess(
    merger: TokenMerger,
    model: HookedModel,
    windows: Windows,
    plain: Plain,
    *,
    context: int | None = None,
    scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None,
) -> pd.DataFrame:
    """What merging costs, window by window, on the same tokens.

    Args:
        merger: calibrated or trained.
        model: a hooked model.
        windows: texts that the merger was neither calibrated nor trained on.
        plain: of the same windows, with logits.
        context: the protocol of that name: only tokens behind that place count.
        scores: see `TokenMerger.attached`.

    Returns:
        a row per window: `doc`, `window`, `excess` (nats per token: mean of -log p merged less plain), `excess_easy` and
        `excess_hard` (halves of the tokens by the plain model's surprisal), `kl` (nats per token, plain to merged), `agreement`
        (share of equal most likely tokens), `seconds` (of the merged pass, per token), `bytes_share` (of the full cache at the
        window's end, all layers), `rate` (merged / tokens, mean over merged layers), `same_id` (share of merges between
        identical token ids; NaN without merges or for rules that drop). Time, bytes, rate and same ids are those of the pass that
        the window was in, a few windows together. `merger.statistics()` then holds all passes.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20], target_rate=0.3, projection=16).calibrate(model, windows.tokens)
        >>> found = bl.merging.excess(merger, model, windows, bl.merging.plain_pass(model, windows))
        >>> len(found), bool((found.bytes_share < 1).all())
        (4, True)
    """
    rows: list[dict[str, object]] = []
    merger.forget()
    for part, kept in zip(batches(windows), plain.logits, strict=True):
        tokens = windows.tokens[part].to(device_of(model))
        before = plain.losses[part]
        given = None if scores is None else {layer: value[part] for layer, value in scores.items()}
        surprisal = as_surprisal(before) if merger.options.preserve == "surprisal" else None
        with merger.attached(model, context=context, scores=given, surprisal=surprisal), torch.no_grad():
            begun = time.perf_counter()
            logits = forward_pass(model, tokens, {})
            logits[0, 0, 0].item()  # waits for the device
            spent = (time.perf_counter() - begun) / tokens.numel()
            same = _same_ids(merger, tokens)
        after = token_losses(logits, tokens)
        said = logits.log_softmax(-1)
        was = kept.float()
        kl = (was.exp() * (was - said)).sum(-1)[:, :-1]
        agree = (plain.best[part] == logits.argmax(-1))[:, :-1].float()
        held = merger.statistics()
        held = held[held["pass"] == held["pass"].max()]
        left = share_left(merger, held)
        first = 0 if context is None else context - 1
        hard = before > before[:, first:].median(dim=1, keepdim=True).values
        for b in range(len(tokens)):
            change, difficult = (after - before)[b, first:], hard[b, first:]
            rows.append(
                {
                    "doc": windows.doc[part.start + b],
                    "window": part.start + b,
                    "excess": float(change.mean()),
                    "seconds": spent,
                    "excess_easy": float(change[~difficult].mean()),
                    "excess_hard": float(change[difficult].mean()),
                    "kl": float(kl[b, first:].mean()),
                    "agreement": float(agree[b, first:].mean()),
                    "bytes_share": left,
                    "rate": float(held["rate"].mean()),
                    "same_id": same,
                }
            )
    return pd.DataFrame(rows)


def share_left(merger: TokenMerger, statistics: pd.DataFrame) -> float:
    """Bytes of the cache, all layers, over those of the full cache."""
    full = float(statistics["full_bytes"].mean())
    n_layers = merger.weights.shape.n_layers
    plain = n_layers - len(merger.options.layers)
    return (float(statistics.groupby("layer")["bytes"].mean().sum()) + plain * full) / (n_layers * full)


def _same_ids(merger: TokenMerger, tokens: Int[Tensor, "batch pos"]) -> float:
    assert merger.pass_ is not None
    same = count = 0
    for found in merger.pass_.assigned.values():
        chosen: Bool[Tensor, "batch pos"] = found.joined & (found.leader >= 0)
        same += int((tokens.gather(1, found.leader.clamp(min=0)) == tokens)[chosen].sum())
        count += int(chosen.sum())
    return same / count if count else float("nan")


def surprisal_for(merger: TokenMerger, model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"] | None:
    """What `TokenMerger.attached` and `calibrate` need to preserve surprising tokens, nats, by a plain pass; None if it preserves
    none.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> tokens = model.to_tokens("The lamp hums, and the lamp hums in the wind.")
        >>> merger = bl.merging.TokenMerger([20], threshold=0.5, recent=4, preserve="surprisal")
        >>> given = bl.merging.surprisal_for(merger, model, tokens)
        >>> merger.calibrate(model, tokens, surprisal=given).calibrated
        True
    """
    if merger.options.preserve != "surprisal":
        return None
    with measuring(model):
        return as_surprisal(token_losses(forward_pass(model, tokens, {}), tokens))


def as_surprisal(losses: Float[Tensor, "batch predicted"]) -> Float[Tensor, "batch pos"]:
    """Each token's own loss in its place; 0 for the first, which nothing predicts."""
    return torch.nn.functional.pad(losses, (1, 0))
