"""One run of a model that merges: what is read at each layer's points, and what is put in its place."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from basin_lens.errors import MergeError
from basin_lens.merging import attention
from basin_lens.merging.assignment import Asked, Assigned, assign
from basin_lens.merging.options import Options
from basin_lens.merging.parameters import Parameters
from basin_lens.merging.policies import KeyRule
from basin_lens.merging.similarity import row_likeness, row_read
from basin_lens.merging.statistics import Merged, Row, layer_statistics
from basin_lens.model import HookedModel, point_name

Reader = Callable[[Tensor], Tensor | None]
Carry = tuple[int, Tensor, Tensor]
_ATTACHED: weakref.WeakKeyDictionary[HookedModel, set[int]] = weakref.WeakKeyDictionary()


@contextmanager
def alone_in(model: HookedModel, layers: Sequence[int]) -> Iterator[None]:
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


@dataclass(frozen=True)
class Given:
    """What a caller gives of the tokens of a pass; see `TokenMerger.attached`."""

    valid: Bool[Tensor, "batch pos"] | None = None
    surprisal: Float[Tensor, "batch pos"] | None = None
    scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None
    context: int | None = None

    def check(self, options: Options, *, needed: bool = True) -> None:
        """Scores, context and padding that fit the options; not `needed`: scores and context may be left out.

        Raises:
            MergeError: they do not.
        """
        rule, layers, scores, valid = options.decision, options.layers, self.scores, self.valid
        if needed and rule.scored and not rule.needs_keys and (scores is None or set(layers) - set(scores)):
            got = "none" if scores is None else f"those of {sorted(scores)}"
            raise MergeError(
                f"expected scores of layers {list(layers)} with the rule {rule.name!r}, got {got}. Give scores={{layer: tensor}}."
            )
        if needed and rule.sees_future and self.context is None:
            raise MergeError(
                f"expected the protocol 'context' with the rule {rule.name!r}, which sees the future, got none. Give context=."
            )
        if self.context is not None and self.context < 1:
            raise MergeError(f"expected a context of 1 token or more, got {self.context}.")
        if valid is not None and not bool((valid[:, 1:] <= valid[:, :-1]).all()):
            raise MergeError("expected padding on the right only, got a real token behind padding. Pad on the right.")

    def check_pass(self, options: Options) -> None:
        """As `check`, for a pass: surprisal and scores where the options ask for them, and only there.

        Raises:
            MergeError: see above.
        """
        if (options.preserve == "surprisal") != (self.surprisal is not None):
            raise MergeError("expected surprisal with preserve='surprisal', and only then. Give it, or use preserve='norm'.")
        if options.rule != "score" and self.scores is not None:
            raise MergeError(f"expected scores with the rule 'score' only, got them with {options.rule!r}. Leave them out.")
        self.check(options)

    def check_shape(self, states: Tensor) -> None:
        """Refuse what is not of the pass's own shape.

        Raises:
            MergeError: it is not.
        """
        scores = {f"scores[{layer}]": given for layer, given in (self.scores or {}).items()}
        for name, given in {"valid": self.valid, "surprisal": self.surprisal, **scores}.items():
            if given is not None and given.shape != states.shape[:2]:
                raise MergeError(f"expected {name} of shape {tuple(states.shape[:2])}, as the pass is, got {tuple(given.shape)}.")

    def real(self, shape: torch.Size, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """Which tokens are no padding."""
        return torch.ones(shape, dtype=torch.bool, device=device) if self.valid is None else self.valid.to(device)


@dataclass(frozen=True)
class Undecided:
    """What is known of a layer's tokens before anything is decided about them.

    Attributes:
        index: number of the layer among those that merge.
        layer: its number in the model.
        descriptors: float16.
        eligible: tokens that may be offered.
        arguments: what else `assign` is given.
    """

    index: int
    layer: int
    descriptors: Float[np.ndarray, "batch pos width"]
    eligible: Bool[np.ndarray, "batch pos"]
    arguments: Asked


class MergePass:
    """The passes of one block in which a model merges. It reads options and parameters and changes neither.

    `assigned`, `share`, `factors`, `levels`, `units`: of each merged layer of the latest pass, by its number in the model. `noted`:
    a row of statistics for each layer of each pass.

    Args:
        options: of the merger.
        parameters: of the merger.
        given: of the tokens.
        soft: read by the soft mask, not the hard decision.
        before: called with each layer's tokens before anything is decided about them, for calibration.
    """

    def __init__(
        self,
        options: Options,
        parameters: Parameters,
        given: Given,
        *,
        soft: bool = False,
        before: Callable[[Undecided], None] | None = None,
    ) -> None:
        self.options, self.parameters, self.given, self.soft, self.before = options, parameters, given, soft, before
        self.assigned: dict[int, Assigned] = {}
        self.share: dict[int, Float[Tensor, "batch pos"]] = {}
        self.factors: dict[int, Float[Tensor, "batch query key"]] = {}
        self.levels: dict[int, Float[Tensor, "batch pos"]] = {}
        self.units: dict[int, Float[Tensor, "batch pos width"]] = {}
        self.noted: list[Row] = []
        self._held: dict[str, Tensor] = {}
        # In a stream that keeps its length, a token that waited would know how many come after it.
        self.recent = 0 if options.simulate else options.recent
        self._mean = options.representative == "mean"

    # ---- hooks -------------------------------------------------------------------------------------------------------------------

    def readers(self) -> dict[str, Reader]:
        """What to do at which point; see `model.reading`."""
        o = self.options
        made: dict[str, Reader] = {}
        for index, layer in enumerate(o.layers):
            made[point_name("resid_pre", layer)] = partial(self._enter, index, layer)
            if not o.simulate:
                made[point_name("pattern", layer)] = partial(self._attend, index, layer)
            if o.decision.needs_keys:
                made[point_name("k", layer)] = partial(self._keep, "keys")
            if o.residual == "gated":
                made[point_name("v", layer)] = partial(self._keep, "values")
                made[point_name("z", layer)] = partial(self._correct, index, layer)
        return made

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor

    def _enter(self, index: int, layer: int, states: Float[Tensor, "batch pos d"]) -> Tensor | None:
        self.given.check_shape(states)
        units, norms = self.parameters.describe(index, states)
        features, _ = context_statistics(units.detach(), norms, None)
        self.units[layer] = units
        self.levels[layer] = self.parameters.level_of(index, features)
        self._held |= {"states": states, "norms": norms, "features": features}
        if not self.options.simulate:
            return None
        self._decide(index, layer, None)
        assigned, share = self.assigned[layer], self.share[layer]
        instead = attention.running_means(assigned, states) if self._mean else attention.leader_rows(states, assigned.leader)
        if not share.requires_grad and not self.soft:
            return torch.where(assigned.joined[:, :, None], instead, states)
        return states + share[:, :, None].to(states.dtype) * (instead - states)

    def _attend(self, index: int, layer: int, pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        if pattern.shape[2] != pattern.shape[3]:
            raise MergeError(
                f"expected a pass over whole sequences, got {pattern.shape[2]} queries of {pattern.shape[3]} keys: a key/value "
                "cache. Use basin_lens.merging.generate, or generate(use_past_kv_cache=False)."
            )
        self._decide(index, layer, pattern)
        assigned, share = self.assigned[layer], self.share[layer]
        if not bool(assigned.joined.any()) and not share.requires_grad and not self.soft:
            self.factors[layer] = torch.ones_like(pattern[:, 0])
            return pattern
        # Not in half precision, which cannot count to 300.
        precise = share.to(torch.promote_types(pattern.dtype, torch.float32))
        mean = self._mean or self.options.decision.sees_future
        read, factors = attention.read_pattern(pattern, assigned, precise, mean=mean, drop=self.options.drop)
        self.factors[layer] = factors
        self._held["pattern"] = read
        return read

    def _correct(self, index: int, layer: int, mixed: Tensor) -> Tensor | None:
        """Add the clusters' residuals to what the heads read."""
        pattern = self._held.pop("pattern", None)
        if pattern is None:
            return None
        parameters, shape, assigned = self.parameters, self.parameters.shape, self.assigned[layer]
        values = self._held.pop("values").reshape(*pattern.shape[:1], pattern.shape[3], -1)
        away = values - attention.leader_rows(values, assigned.leader)
        change = parameters.expand_residual(index, parameters.shrink_residual(index, away))
        added = attention.spread_residual(
            pattern,
            self.factors[layer].to(pattern.dtype),
            assigned,
            self.share[layer].to(pattern.dtype),
            change.reshape(*values.shape[:2], shape.kv, shape.d_head),
        )
        return mixed + added.reshape(mixed.shape)

    # ---- decisions ---------------------------------------------------------------------------------------------------------------

    def eligible(self, index: int, norms: Float[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Tokens that may be merged: real, behind position 0, not preserved, and offered before their own sequence ends."""
        given, context = self.given, self.given.context
        real = given.real(norms.shape, norms.device)
        found = real.clone()
        if self.options.preserve == "norm":
            found &= norms <= self.parameters.norm_cutoff[index]
        if given.surprisal is not None:
            found &= given.surprisal.to(norms.device) <= self.parameters.surprisal_cutoff
        ends = real.sum(1)
        last = ends - self.recent if context is None else torch.where(ends >= context, context, 0)
        places = torch.arange(norms.shape[1], device=norms.device)
        return found & (places >= 1) & (places < last[:, None])

    def _decide(self, index: int, layer: int, pattern: Float[Tensor, "batch head query key"] | None) -> None:
        """Offer the layer's tokens to the clusters before them, and note what came of it."""
        o, units = self.options, self.units[layer]
        able = self.eligible(index, self._held["norms"])
        rows = pattern.detach().double().cpu().numpy() if pattern is not None and o.attention_weight else None
        arguments: Asked = {
            "rule": o.rule,
            "recent": self.recent,
            "context": self.given.context,
            "drop": o.drop,
            "mean": self._mean,
            "seed": (o.seed, layer),
            "scores": self._scores(layer),
            "pattern": rows,
            "weight": o.attention_weight,
        }
        asked = Undecided(index, layer, units.detach().cpu().half().numpy(), able.cpu().numpy(), arguments)
        if self.before is not None:
            self.before(asked)
            self.levels[layer] = self.parameters.level_of(index, self._held["features"])
        levels = self.levels[layer]
        found = assign(asked.descriptors, levels.detach().double().cpu().numpy(), asked.eligible, **arguments)
        found = Assigned(*(t.to(units.device) for t in (found.leader, found.joined, found.since)))
        self.assigned[layer] = found
        self.share[layer] = self._share(layer, found, rows)
        real = self.given.real(able.shape, able.device)
        closed = self.given.context is not None
        merged = Merged(layer, found, able, real, levels, units, self._held["states"], self.recent, closed)
        self.noted.append(layer_statistics(o, self.parameters, merged))

    def _share(
        self, layer: int, found: Assigned, rows: Float[np.ndarray, "batch head query key"] | None
    ) -> Float[Tensor, "batch pos"]:
        """How much of each token is read through its cluster: all or nothing, with a gradient where something is learned."""
        o, units, levels = self.options, self.units[layer], self.levels[layer]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters.parameters())
        if not o.decision.learned or not (self.soft or learning):
            return found.joined.to(levels.dtype)
        other = attention.running_means(found, units) if self._mean else attention.leader_rows(units, found.leader)
        precise = torch.promote_types(units.dtype, torch.float32)
        cosine = torch.nn.functional.cosine_similarity(units.to(precise), other.to(precise), dim=-1)
        if rows is not None:
            cosine = (1 - o.attention_weight) * cosine + o.attention_weight * self._likeness(found, rows)
        return attention.share_of(found, cosine, levels, o.temperature, soft=self.soft)

    def _scores(self, layer: int) -> Float[np.ndarray, "batch pos"] | None:
        rule = self.options.decision
        if isinstance(rule, KeyRule):
            keys = self._held.pop("keys")
            return rule.key_scores(keys.reshape(*keys.shape[:2], self.parameters.shape.kv, -1).detach())
        return None if self.given.scores is None else self.given.scores[layer].detach().double().cpu().numpy()

    def _likeness(self, assigned: Assigned, pattern: Float[np.ndarray, "batch head query key"]) -> Float[Tensor, "batch pos"]:
        """Similarity of attention rows with the one that each token was compared with, as a constant of the gradient."""
        made = np.zeros(tuple(assigned.leader.shape))
        factors = attention.read_weights(assigned, assigned.joined.double(), drop=self.options.drop).cpu().numpy()
        for b, leaders in enumerate(assigned.leader.cpu().numpy()):
            rows = np.stack([row_read(pattern[b, :, t], factors[b, t]) for t in range(len(leaders))]).astype(np.float32)
            for place in np.flatnonzero(leaders >= 0):
                at = leaders[place : place + 1]
                made[b, place] = row_likeness(rows[place], rows[at], at)[0]
        return torch.from_numpy(made).to(assigned.leader.device, torch.float32)


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
