"""One run of a model with a merger attached: what is read at each layer's points, and what is put in its place."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.errors import MergeError
from basin_lens.merging import merge
from basin_lens.merging.assign import Assigned, assign
from basin_lens.merging.budget import bytes_for, find_level
from basin_lens.model import point_name

if TYPE_CHECKING:
    from basin_lens.merging.hook import TokenMerger

N_FEATURES = 4
Carry = tuple[int, Tensor, Tensor]
_ATTACHED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


@contextmanager
def alone_in(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Refuse a second merger in a layer: it would take for the plain pattern what the first made of it."""
    taken = _ATTACHED.setdefault(model, set())
    if both := taken & set(layers):
        raise MergeError(
            f"expected layers without a merger, got one attached in {sorted(both)}. Leave its block first, or choose others."
        )
    taken |= set(layers)
    try:
        yield
    finally:
        taken -= set(layers)


class Pass:
    """State of the passes inside one `TokenMerger.attached`; the latest pass's is there to be read.

    `assigned`, `share`, `weights`, `levels`: of each merged layer, by its number in the model.
    """

    def __init__(
        self, merger: "TokenMerger", *, valid: Bool[Tensor, "batch pos"] | None, surprisal: Float[Tensor, "batch pos"] | None,
        scores: Mapping[int, Float[Tensor, "batch pos"]] | None, context: int | None, soft: bool, rates: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        self.merger, self.valid, self.surprisal, self.scores = merger, valid, surprisal, scores
        self.context, self.soft, self.rates = context, soft, rates
        self.assigned: dict[int, Assigned] = {}
        self.share: dict[int, Float[Tensor, "batch pos"]] = {}
        self.weights: dict[int, Float[Tensor, "batch query key"]] = {}
        self.levels: dict[int, Float[Tensor, "batch pos"]] = {}
        self.units: dict[int, Float[Tensor, "batch pos width"]] = {}
        self._held: dict[str, Tensor] = {}
        self.noted: list[dict[str, Any]] = []
        # In a stream that keeps its length, a token that waited would know how many come after it.
        self.recent = 0 if merger.options.simulate else merger.options.recent

    def check_given(self, *, needed: bool = True) -> None:
        """Scores, context and padding that fit the options; not `needed`: scores and context may be left out."""
        o, scores, context, valid = self.merger.options, self.scores, self.context, self.valid
        if needed and o.rule == "score" and (scores is None or set(o.layers) - set(scores)):
            got = "none" if scores is None else f"those of {sorted(scores)}"
            raise MergeError(
                f"expected scores of layers {list(o.layers)} with the rule 'score', got {got}. Give scores={{layer: tensor}}."
            )
        if needed and o.rule == "bipartite" and context is None:
            raise MergeError(
                "expected the protocol 'context' with the rule 'bipartite', which sees the future, got none. Give context=."
            )
        if context is not None and context < 1:
            raise MergeError(f"expected a context of 1 token or more, got {context}.")
        if valid is not None and not bool((valid[:, 1:] <= valid[:, :-1]).all()):
            raise MergeError("expected padding on the right only, got a real token behind padding. Pad on the right.")

    # ---- hooks -----------------------------------------------------------------------------------------------------------------------

    def readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """What to do at which point; see `model.reading`."""
        o = self.merger.options
        made: dict[str, Callable[[Tensor], Tensor | None]] = {}
        for index, layer in enumerate(o.layers):
            made[point_name("resid_pre", layer)] = partial(self._enter, index, layer)
            if not o.simulate:
                made[point_name("pattern", layer)] = partial(self._attend, index, layer)
            if o.rule == "key_norm":
                made[point_name("k", layer)] = partial(self._keep, "keys")
            if o.residual == "gated":
                made[point_name("v", layer)] = partial(self._keep, "values")
                made[point_name("z", layer)] = partial(self._correct, index, layer)
        return made

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor

    def _enter(self, index: int, layer: int, states: Float[Tensor, "batch pos d"]) -> Tensor | None:
        merger = self.merger
        self._check_shape(states)
        units, norms = merger.describe(index, states)
        features, _ = context_statistics(units.detach(), norms, None)
        self.units[layer] = units
        self.levels[layer] = merger.level_of(index, features)
        self._held["states"], self._held["norms"] = states, norms
        if not merger.options.simulate:
            return None
        self._decide(index, layer, None)
        o, assigned, share = merger.options, self.assigned[layer], self.share[layer]
        mean = o.representative == "mean"
        instead = merge.running_means(assigned, states) if mean else merge.leader_rows(states, assigned.leader)
        self._note(index, layer, states)
        if not share.requires_grad and not self.soft:
            return torch.where(assigned.joined[:, :, None], instead, states)
        return states + share[:, :, None].to(states.dtype) * (instead - states)

    def _attend(self, index: int, layer: int, pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        if pattern.shape[2] != pattern.shape[3]:
            raise MergeError(
                f"expected a pass over whole sequences, got {pattern.shape[2]} queries of {pattern.shape[3]} keys: a key/value cache. Use "
                "basin_lens.merging.generate, or generate(use_past_kv_cache=False)."
            )
        o = self.merger.options
        self._decide(index, layer, pattern)
        assigned, share = self.assigned[layer], self.share[layer]
        self._note(index, layer, self._held["states"])
        if not bool(assigned.joined.any()) and not share.requires_grad and not self.soft:
            self.weights[layer] = torch.ones_like(pattern[:, 0])
            return pattern
        # Not in half precision, which cannot count to 300.
        read, weights = merge.read_pattern(
            pattern,
            assigned,
            share.to(torch.promote_types(pattern.dtype, torch.float32)),
            mean=o.representative == "mean" or o.rule == "bipartite",
            drop=o.drop,
        )
        self.weights[layer] = weights
        self._held["pattern"] = read
        return read

    def _correct(self, index: int, layer: int, mixed: Tensor) -> Tensor | None:
        """Add the clusters' residuals to what the heads read."""
        merger, pattern = self.merger, self._held.pop("pattern", None)
        if pattern is None:
            return None
        values = self._held.pop("values").reshape(*pattern.shape[:1], pattern.shape[3], -1)
        assigned = self.assigned[layer]
        change = merger.expand_residual(index, merger.shrink_residual(index, values - merge.leader_rows(values, assigned.leader)))
        added = merge.spread_residual(
            pattern, self.weights[layer].to(pattern.dtype), assigned, self.share[layer].to(pattern.dtype),
            change.reshape(*values.shape[:2], merger.kv, merger.d_head),
        )  # fmt: skip
        return mixed + added.reshape(mixed.shape)

    # ---- decisions -------------------------------------------------------------------------------------------------------------------

    def _check_shape(self, states: Tensor) -> None:
        scores = {f"scores[{layer}]": given for layer, given in (self.scores or {}).items()}
        for name, given in {"valid": self.valid, "surprisal": self.surprisal, **scores}.items():
            if given is not None and given.shape != states.shape[:2]:
                raise MergeError(f"expected {name} of shape {tuple(states.shape[:2])}, as the pass is, got {tuple(given.shape)}.")

    def eligible(self, index: int, norms: Float[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Tokens that may be merged: real, behind position 0, not preserved, and offered before their own sequence ends."""
        merger = self.merger
        found = torch.ones_like(norms, dtype=torch.bool) if self.valid is None else self.valid.to(norms.device).clone()
        if merger.options.preserve == "norm":
            found &= norms <= merger.norm_cutoff[index]
        if self.surprisal is not None:
            found &= self.surprisal.to(norms.device) <= merger.surprisal_cutoff
        length = norms.shape[1]
        ends = (
            torch.full(norms.shape[:1], length, device=norms.device) if self.valid is None else self.valid.sum(1).to(norms.device)
        )
        last = ends - self.recent if self.context is None else torch.where(ends >= self.context, self.context, 0)
        places = torch.arange(length, device=norms.device)
        return found & (places >= 1) & (places < last[:, None])

    def _decide(self, index: int, layer: int, pattern: Float[Tensor, "batch head query key"] | None) -> None:
        merger, o = self.merger, self.merger.options
        units, levels = self.units[layer], self.levels[layer]
        device = units.device
        eligible = self.eligible(index, self._held["norms"]).cpu().numpy()
        descriptors = units.detach().cpu().half().numpy()
        rows = pattern.detach().double().cpu().numpy() if pattern is not None and o.attention_weight else None
        arguments: dict[str, Any] = {
            "rule": "score" if o.rule == "key_norm" else o.rule, "recent": self.recent, "context": self.context, "drop": o.drop,
            "mean": o.representative == "mean", "seed": (o.seed, layer), "scores": self._scores(layer), "pattern": rows,
            "weight": o.attention_weight,
        }  # fmt: skip
        if self.rates is not None:
            tokens = eligible.size if self.valid is None else int(self.valid.sum())
            merger.set_level(index, find_level(merger, round(self.rates[layer] * tokens), descriptors, eligible, arguments))
            features, _ = context_statistics(units.detach(), self._held["norms"], None)
            levels = self.levels[layer] = merger.level_of(index, features)
        found = assign(descriptors, levels.detach().double().cpu().numpy(), eligible, **arguments)
        found = Assigned(*(t.to(device) for t in (found.leader, found.joined, found.since)))
        self.assigned[layer] = found
        if o.learned and (self.soft or (torch.is_grad_enabled() and any(p.requires_grad for p in merger.parameters()))):
            mean = o.representative == "mean"
            other = merge.running_means(found, units) if mean else merge.leader_rows(units, found.leader)
            precise = torch.promote_types(units.dtype, torch.float32)
            cosine = torch.nn.functional.cosine_similarity(units.to(precise), other.to(precise), dim=-1)
            if rows is not None:
                cosine = (1 - o.attention_weight) * cosine + o.attention_weight * self._likeness(found, rows)
            self.share[layer] = merge.share_of(found, cosine, levels, o.temperature, soft=self.soft)
        else:
            self.share[layer] = found.joined.to(levels.dtype)

    def _scores(self, layer: int) -> Float[np.ndarray, "batch pos"] | None:
        if self.merger.options.rule == "key_norm":
            keys = self._held.pop("keys")
            heads = keys.reshape(*keys.shape[:2], self.merger.kv, -1)
            return heads.detach().double().norm(dim=3).mean(2).cpu().numpy()
        return None if self.scores is None else self.scores[layer].detach().double().cpu().numpy()

    def _likeness(self, assigned: Assigned, pattern: Float[np.ndarray, "batch head query key"]) -> Tensor:
        """Similarity of attention rows with the one that each token was compared with, as a constant of the gradient."""
        from basin_lens.merging.assign import row_likeness, row_read

        made = np.zeros(assigned.leader.shape)
        weights = merge.read_weights(assigned, assigned.joined.double(), drop=self.merger.options.drop).cpu().numpy()
        for b, leaders in enumerate(assigned.leader.cpu().numpy()):
            rows = np.stack([row_read(pattern[b, :, t], weights[b, t]) for t in range(len(leaders))]).astype(np.float32)
            for place in np.flatnonzero(leaders >= 0):
                at = leaders[place : place + 1]
                made[b, place] = row_likeness(rows[place], rows[at], at)[0]
        return torch.from_numpy(made).to(assigned.leader.device, torch.float32)

    # ---- what happened ---------------------------------------------------------------------------------------------------------------

    def _note(self, index: int, layer: int, states: Float[Tensor, "batch pos d"]) -> None:
        merger, o, found = self.merger, self.merger.options, self.assigned[layer]
        joined = found.joined
        batch, length = joined.shape
        valid = torch.ones_like(joined) if self.valid is None else self.valid.to(joined.device)
        eligible = self.eligible(index, self._held["norms"])
        merged, offered, lengths = joined.sum(1), eligible.sum(1), valid.sum(1)
        clusters = offered - merged
        waiting = (lengths - 1).clamp(min=0, max=self.recent)
        # An attention row is as long as its token's past; kept of leaders, and of tokens that wait.
        places = torch.arange(1, length + 1, device=joined.device)
        ends = lengths[:, None]
        rows = (((eligible & ~joined) | (valid & (places > 1) & (places > ends - self.recent))) * places).sum(1)
        kept = [
            bytes_for(merger, int(n - m), int(c), int(w), numbers=int(r), closed=self.context is not None)
            for n, m, c, w, r in zip(lengths, merged, clusters, waiting, rows, strict=True)
        ]
        full = int(lengths.sum()) * merger.row_bytes
        if o.simulate:
            kept = [int(n) * merger.row_bytes for n in lengths]
        sizes = torch.zeros(batch, length, dtype=torch.long, device=joined.device).scatter_add_(
            1, found.leader.clamp(min=0), (joined & (found.leader >= 0)).long()
        )
        self.noted.append(
            {
                "layer": layer, "sequences": batch, "tokens": int(lengths.sum()), "eligible": int(offered.sum()), "merged": int(merged.sum()),
                "rate": float(merged.sum() / lengths.sum()), "clusters": int(clusters.sum()), "largest": int(sizes.max()) + 1,
                "rows": int((lengths - (0 if o.simulate else merged)).sum()), "bytes": sum(kept), "full_bytes": full,
                "level": float(self.levels[layer].detach().mean()), **self._errors(layer, found, states.detach(), eligible),
            }
        )  # fmt: skip
        if self.rates is None:
            merger.record(self.noted[-1:], first=index == 0)

    def _errors(
        self, layer: int, found: Assigned, states: Float[Tensor, "batch pos d"], eligible: Bool[Tensor, "batch pos"]
    ) -> dict[str, float]:  # fmt: skip
        chosen = found.joined & (found.leader >= 0)
        if not bool(chosen.any()):
            return {"similarity": float("nan"), "state_error": float("nan")}
        units, row = self.units[layer].detach(), chosen.nonzero()[:, 0]
        leader = found.leader[chosen]
        cosine = torch.nn.functional.cosine_similarity(units[chosen], units[row, leader], dim=-1)
        wide = states.float()
        standing = wide
        if self.merger.options.representative == "mean":
            own = torch.arange(wide.shape[1], device=wide.device).expand(chosen.shape)
            home = torch.where(chosen, found.leader, own)
            sums = torch.zeros_like(wide).scatter_add_(1, home[..., None].expand_as(wide), wide)
            sizes = torch.zeros(chosen.shape, device=wide.device).scatter_add_(1, home, torch.ones_like(home, dtype=torch.float32))
            standing = sums / sizes.clamp(min=1)[..., None]
        away = (wide[chosen] - standing[row, leader]).square().sum()
        # Of the same tokens: a few massive ones among the others would make any error look small.
        spread = (wide[chosen] - wide[eligible].mean(0)).square().sum()
        similarity = float(cosine.mean()) if units.shape[2] else float("nan")
        return {"similarity": similarity, "state_error": float(away / spread) if float(spread) > 0 else float("nan")}

    # ---- calibration -----------------------------------------------------------------------------------------------------------------

    def gatherers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """Read the states that enter each merged layer, and change nothing."""
        return {
            point_name("resid_pre", layer): partial(self._gather, index) for index, layer in enumerate(self.merger.options.layers)
        }

    def _gather(self, index: int, states: Float[Tensor, "batch pos d"]) -> None:
        self._check_shape(states)
        real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if self.valid is None else self.valid.clone()
        real[:, 0] = False  # the attention sink is far from everything
        merger, o = self.merger, self.merger.options
        rows = states[real].float()
        least = max(2, 0 if merger.head is None else merger.head.shape[1])
        if len(rows) < least:
            raise MergeError(f"expected {least} tokens or more behind position 0 to calibrate on, got {len(rows)}. Give more text.")
        merger.center[index] = rows.mean(0)
        if merger.head is not None:
            # Principal directions: what a cosine in few numbers keeps most of.
            merger.head.data[index] = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[: merger.head.shape[1]]
        units, norms = merger.describe(index, states)
        if o.preserve == "norm":
            merger.norm_cutoff[index] = norms[real].float().quantile(1 - o.preserve_share)
        features = context_statistics(units, norms, None)[0][real].float()
        merger.feature_mean[index] = features.mean(0)
        merger.feature_scale[index] = features.std(0).clamp(min=1e-3)

    def settle(self, surprisal: Float[Tensor, "batch pos"] | None) -> None:
        """The quantile of surprisal."""
        o = self.merger.options
        if o.preserve == "surprisal":
            assert surprisal is not None
            real = torch.ones_like(surprisal, dtype=torch.bool) if self.valid is None else self.valid.clone()
            real[:, 0] = False
            self.merger.surprisal_cutoff.fill_(float(surprisal[real].quantile(1 - o.preserve_share)))


def context_statistics(
    units: Float[Tensor, "batch pos width"], norms: Float[Tensor, "batch pos"], carry: Carry | None
) -> tuple[Float[Tensor, "batch pos features"], Carry]:
    """What an adaptive threshold may know of a token, from itself and those before it.

    Log of its place, norm of its state, cosine with the token before it, cosine with the sum of all before it.

    Args:
        units: descriptors.
        norms: of the centered states.
        carry: what the last call gave back, if these tokens follow on.
    """
    batch, length, width = units.shape
    wide = units.float()
    start, total, last = carry or (0, wide.new_zeros(batch, width), wide.new_zeros(batch, width))
    sums = total[:, None] + torch.cat([torch.zeros_like(wide[:, :1]), wide.cumsum(1)], 1)
    before = torch.cat([last[:, None], wide[:, :-1]], 1)
    places = torch.arange(start, start + length, device=units.device).float().log1p().expand(batch, length)
    cosine = torch.nn.functional.cosine_similarity
    made = torch.stack([places, norms.float(), cosine(wide, before, dim=-1), cosine(wide, sums[:, :-1], dim=-1)], 2)
    # Copies: a view would keep all rows.
    return made, (start + length, sums[:, -1].clone(), wide[:, -1].clone())
