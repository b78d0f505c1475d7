"""What perplexity hides: copying, written text, and who merged into whom."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.capture.passes import token_losses
from basin_lens.errors import MergeError
from basin_lens.merging.cache import generate
from basin_lens.merging.losses import share_left, surprisal_for
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.model import (
    HookedModel,
    continuations,
    counting_memory,
    device_of,
    forward_pass,
    measuring,
    start_token,
    vocabulary_size,
)
from basin_lens.values import whole_numbers


@whole_numbers(MergeError)
def induction_probe(
    model: HookedModel, made: dict[str, TokenMerger], *, length: int = 48, sequences: int = 8, seed: int = 0
) -> pd.DataFrame:
    """Random tokens, then the same tokens again: can the second run still be copied from the first? Perplexity hardly sees it.

    Returns:
        a row per policy and sequence: `policy`, `sequence`, `loss` (nats per token of the second run), `plain_loss`, `excess`,
        `accuracy` (share of the second run's tokens that are the most likely one), `plain_accuracy`, `bytes_share`.

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
    rows: list[dict[str, object]] = []
    for policy, merger in made.items():
        merger.forget()
        with merger.attached(model, surprisal=surprisal_for(merger, model, tokens)), torch.no_grad():
            loss, right = second(forward_pass(model, tokens, {}))
        share = share_left(merger, merger.statistics())
        rows += [
            {
                "policy": policy,
                "sequence": i,
                "loss": float(loss[i]),
                "plain_loss": float(plain[0][i]),
                "excess": float(loss[i] - plain[0][i]),
                "accuracy": float(right[i]),
                "plain_accuracy": float(plain[1][i]),
                "bytes_share": share,
            }
            for i in range(sequences)
        ]
    return pd.DataFrame(rows)


@whole_numbers(MergeError)
def generation_quality(
    merger: TokenMerger, model: HookedModel, prompts: Int[Tensor, "batch pos"], length: int, *, progress: bool = False
) -> pd.DataFrame:
    """Text written greedily with the compressed cache, beside the plain model's from the same prompts.

    Returns:
        a row per prompt and `cache` ("full", "compressed"): `text` ids as `tokens`, `base_loss` (nats per token: the plain model's
        loss on what was written), `repetition` (share of its 4-token runs that were there before), `bytes_share` (of the full cache
        at the end), `peak_bytes` (tensors made while writing, at most at one time, all prompts together).

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
    # The same steps over a cache that is never compressed: one pass over the prompt would hold all of its logits at once.
    with counting_memory() as plain_memory:
        generate(TokenMerger([0], threshold=1.0), model, prompts, length, past_end=True)
    plain = continuations(model, prompts, length)
    share = float(table["bytes"].sum() / table["full_bytes"].sum())
    rows: list[dict[str, object]] = []
    for cache, text, held, peak in (("full", plain, 1.0, plain_memory.peak), ("compressed", written, share, memory.peak)):
        whole = torch.cat([prompts.cpu(), text], 1).to(device_of(model))
        with measuring(model):
            losses = token_losses(forward_pass(model, whole, {}), whole)[:, prompts.shape[1] - 1 :]
        rows += [
            {
                "prompt": i,
                "cache": cache,
                "tokens": text[i].tolist(),
                "base_loss": float(losses[i].mean()),
                "repetition": repetition(text[i].tolist()),
                "bytes_share": held,
                "peak_bytes": peak,
            }
            for i in range(len(text))
        ]
    return pd.DataFrame(rows)


def repetition(tokens: Sequence[int], run: int = 4) -> float:
    """Share of the runs of so many tokens that came before in the same text; NaN for a text shorter than two runs."""
    runs = [tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else float("nan")


def merge_map(merger: TokenMerger, model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> pd.DataFrame:
    """Who merged into whom: a row per merged layer, sequence and token.

    Columns: `layer`, `seq`, `pos`, `token_id`, `leader` (place of the cluster's first token; its own place if it opened one or
    stayed raw), `merged`, `cluster_size` (tokens in its cluster at the end), `merged_layers` (share of the merged layers in which
    the token is merged).

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
        facts = {
            "layer": layer,
            "seq": seq.ravel(),
            "pos": pos.ravel(),
            "token_id": tokens.cpu().numpy().ravel(),
            "leader": leader.ravel(),
            "merged": joined.ravel(),
            "cluster_size": sizes.ravel(),
        }
        parts.append(pd.DataFrame(facts))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(merged_layers=table.groupby(["seq", "pos"])["merged"].transform("mean"))
