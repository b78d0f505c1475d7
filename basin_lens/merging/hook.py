"""Token merging inside a running model: hooks that let attention read clusters, and are gone afterwards."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn

from basin_lens import records
from basin_lens.errors import MergeError, StoreError
from basin_lens.files import lock_folder, write_file
from basin_lens.merging.budget import meet_target
from basin_lens.merging.options import Options
from basin_lens.merging.passes import N_FEATURES, Pass, alone_in
from basin_lens.model import (
    check_model,
    device_of,
    fingerprint,
    forward_pass,
    full_name,
    kv_shape,
    measuring,
    missing_points,
    n_layers,
    obeys_pattern,
    parameters_of,
    reading,
)
from basin_lens.model import width as width_of
from basin_lens.values import Whole, whole

_KIND = records.Kind("a saved merger", "basin_lens token merger 2", "Train or calibrate the merger again.")
_FIELDS = {"options": dict, "base": str, "calibrated": bool, "facts": dict}
_WEIGHTS, RECORD = "merger", "merger.json"


class TokenMerger(nn.Module):
    """Causal token merging: in chosen layers, a new token joins the cluster of an earlier one, and attention reads the cluster once.

    Streaming protocol. When `recent` more tokens have come, a token is compared with the clusters made before it; it joins the most
    similar one if the similarity reaches the threshold, else it opens one. From then on queries read the cluster in its place: one key
    (the leader's, with its rotary position), one value, log(size) on the logit. What an earlier query read never changes, position 0 and
    the recent window stay raw, and nothing is shared between sequences. The similarity is the cosine of the states that enter the layer,
    centered by calibration (and projected), mixed with that of the attention rows.

    Args:
        layers: where to merge.
        threshold: similarity from which a token joins, `floor` to 1; from 1 on nothing is merged. Or
        target_rate: share of the tokens to merge in these layers, on average. Or
        target_bytes: share of the full key/value cache to be left, all layers counted. Both targets need `calibrate`.
        rule: who joins whom: `basin_lens.merging.RULES`, or `"key_norm"` (with `drop`: evicts keys of large norm). All but "cosine" are
            baselines.
        drop: tokens that would join are forgotten instead.
        representative: `"leader"` (the first member) or `"mean"` (running mean of the values; keys stay the leader's).
        adaptive: the threshold moves with what came before the token (place, norm, novelty), by learned weights.
        progressive: merge less in early layers (depth below 0.3: half), more in late ones (from 0.7: one and a half times).
        attention_weight: share of the attention rows in the similarity, 0 to 1. The rows have to be kept, and are counted.
        projection: width to which states are projected before they are compared (principal directions until trained); None: not at all.
        residual: `"gated"`: a cluster keeps the mean difference of its members' values from its leader's, in `residual_width` numbers.
        residual_width: see above.
        preserve: `"norm"` or `"surprisal"`: tokens above the calibrated quantile are never merged. Surprisal (of the plain model) must be
            given to `attached`.
        preserve_share: share of tokens above it.
        contrastive_weight: in training, of the hinge on the cosine between clusters of one sequence.
        margin: cosine from which it acts.
        recent: tokens that stay raw behind the current one, itself counted; of no effect with `simulate`.
        floor: lowest threshold.
        temperature: of the soft mask that training goes by.
        simulate: overwrite the states of merged tokens with their representative's instead, as soon as they come, in a stream that keeps its
            length: saves no memory.
        seed: of random merging.

    Raises:
        MergeError: options that do not fit.

    Source: online leader clustering (Hartigan 1975); Bolya et al. 2023 (token merging, size on the logit); Nawrot et al. 2024 (dynamic memory
    compression); Bonnaerens and Dambre 2023 (learned thresholds).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> merger = bl.merging.TokenMerger(layers=[10, 20], threshold=0.9)
        >>> with merger.attached(model):
        ...     logits = model("The lamp hums, and the lamp hums, and the lamp hums in the wind.")
        >>> merger.statistics().layer.tolist()
        [10, 20]
    """

    center: Tensor
    levels: Tensor
    norm_cutoff: Tensor
    surprisal_cutoff: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    offset: Tensor
    head: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None
    gate: nn.Parameter | None
    slope: nn.Parameter | None

    def __init__(self, layers: Sequence[Whole], **options: Any) -> None:
        super().__init__()
        try:
            self.options = Options(layers=tuple(sorted(whole(n, "layers", error=MergeError) for n in layers)), **options)
        except TypeError as error:
            raise MergeError(f"expected options of TokenMerger, got another: {error}. See its docstring.") from error
        self.base: str | None = None  # fingerprint of the model that it was prepared for
        self.base_changes = False  # while the base model is trained
        self.calibrated = False
        self.facts: dict[str, Any] = {}
        self._records: list[dict[str, Any]] = []
        self._passes = 0
        self.pass_: Pass | None = None

    # ---- one model -------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # parameters and buffers are written to later, whatever mode the caller is in
    def prepare(self, model: Any) -> "TokenMerger":
        """Make the parameters for this model; nothing if that was done.

        Raises:
            MergeError: another model than before, layers or points it does not have, or attention that does not obey its pattern.
        """
        if self.base_changes and self.base is not None:
            return self
        check_model(model)
        name = fingerprint(model)
        if self.base == name:
            return self
        if self.base is not None:
            raise MergeError(
                f"expected the model that this merger was made for ({self.base}), got {full_name(model)} ({name}). Make another merger."
            )
        o, n = self.options, n_layers(model)
        if max(o.layers) >= n:
            raise MergeError(f"expected layers below {n}, got {max(o.layers)}.")
        points = {"resid_pre", "pattern"} | ({"v", "z"} if o.residual == "gated" else set())
        points |= {"k"} if o.rule == "key_norm" else set()
        if missing := missing_points(model, points, list(o.layers)):
            raise MergeError(f"expected the hook points of merging, got a model without {missing[0]}.")
        if not obeys_pattern(model, o.layers[0]):
            raise MergeError(
                f"expected attention that reads the pattern that a hook returns, got {full_name(model)}, which goes past it. Use another model."
            )
        width, count, device = width_of(model), len(o.layers), device_of(model)
        kv, d_head = kv_shape(model)
        self.kv, self.d_head = kv, d_head
        self.n_layers = n
        self.element_bytes = next(iter(parameters_of(model).values())).element_size()
        self.row_bytes = 2 * kv * d_head * self.element_bytes
        draw = torch.Generator(device="cpu").manual_seed(o.seed)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.register_buffer("center", zeros(count, width))
        self.register_buffer("levels", zeros(count))
        self.register_buffer("norm_cutoff", torch.full((count,), math.inf, device=device))
        self.register_buffer("surprisal_cutoff", torch.full((), math.inf, device=device))
        self.register_buffer("feature_mean", zeros(count, N_FEATURES))
        self.register_buffer("feature_scale", torch.ones(count, N_FEATURES, device=device))
        self.register_buffer("offset", zeros())
        self.raw = nn.Parameter(zeros(count))
        self.slope = nn.Parameter(zeros(count, N_FEATURES)) if o.adaptive else None
        self.head = None
        if o.projection is not None and o.compares:
            if o.projection > width:
                raise MergeError(f"expected a projection of at most {width} numbers (the model's width), got {o.projection}.")
            square = torch.linalg.qr(torch.randn(count, width, o.projection, generator=draw)).Q
            self.head = nn.Parameter(square.transpose(1, 2).contiguous().to(device))
        self.down = self.up = self.gate = None
        if o.residual == "gated":
            q, flat = min(o.residual_width, kv * d_head), kv * d_head
            basis = torch.linalg.qr(torch.randn(count, flat, q, generator=draw)).Q.to(device)
            self.down = nn.Parameter(basis.transpose(1, 2).contiguous())
            self.up = nn.Parameter(basis.contiguous())
            self.gate = nn.Parameter(zeros(count))  # sigmoid of it: half open
        self.base = name
        if o.threshold is not None:
            for index, layer in enumerate(o.layers):
                factor = o.strictness(layer, n)
                # Half as eager: half-way to 1; half again as eager: as much below.
                level = o.threshold if o.threshold >= 1 or not o.learned else 1 - (1 - o.threshold) * factor
                # Of other rules the level is a share of the tokens, but a score has no factor.
                self.set_level(index, max(level, o.floor) if o.learned else level if o.scored else min(level * factor, 1.0))
        return self

    def set_level(self, index: int, level: float) -> None:
        """Put the threshold (or the rule's level) of the merger's layer number `index`."""
        with torch.no_grad():
            self.levels[index] = level
            if self.options.learned:
                inside = (level - self.options.floor) / (1 - self.options.floor)
                self.raw[index] = math.inf if level >= 1 else math.log(max(inside, 1e-6) / max(1 - inside, 1e-6))

    def level_of(self, index: int, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        """The threshold that each token is held to; between floor and 1, moved towards 1 by the parachute's offset."""
        if not self.options.learned:
            return self.levels[index].expand(features.shape[:-1])
        raw = self.raw[index].expand(features.shape[:-1])
        if self.slope is not None:
            scaled = (features.float() - self.feature_mean[index]) / self.feature_scale[index]
            raw = raw + scaled @ self.slope[index]
        level = self.options.floor + (1 - self.options.floor) * torch.sigmoid(raw)
        return level + self.offset * (1 - level)

    def describe(self, index: int, states: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "*rows"]]:
        """Unit descriptor of each state, rounded to float16 as it would be stored, and the norm of the centered state."""
        centered = states - self.center[index].to(states.dtype)
        norms = centered.detach().norm(dim=-1)
        if not self.options.compares:
            return centered.new_zeros(*centered.shape[:-1], 0), norms  # a view would keep all of it
        compared = centered if self.head is None else centered @ self.head[index].to(states.dtype).T
        unit = compared / compared.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        rounded = unit.half().to(states.dtype)
        # The gradient goes past the rounding, which would lose what float16 cannot hold.
        return unit + (rounded - unit).detach() if unit.requires_grad else rounded, norms

    def shrink_residual(self, index: int, change: Float[Tensor, "*rows flat"]) -> Float[Tensor, "*rows q"]:
        """What a cluster keeps of the difference between a member's values and its leader's."""
        assert self.down is not None
        return change @ self.down[index].to(change.dtype).T

    def expand_residual(self, index: int, kept: Float[Tensor, "*rows q"]) -> Float[Tensor, "*rows flat"]:
        """What is read of it."""
        assert self.up is not None and self.gate is not None
        return torch.sigmoid(self.gate[index]).to(kept.dtype) * (kept @ self.up[index].to(kept.dtype).T)

    # ---- running ---------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(
        self,
        model: Any,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        surprisal: Float[Tensor, "batch pos"] | None = None,
        scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None,
        context: int | None = None,
        soft: bool = False,
    ) -> Iterator["TokenMerger"]:
        """Every pass inside the block merges; the hooks are gone after it, also on errors.

        Passes are over whole sequences, and so is `model.generate(use_past_kv_cache=False)`; `basin_lens.merging.generate` keeps a compressed
        cache. Attention is eager and dropout is off inside.

        Args:
            model: a hooked model.
            valid: real tokens, if the passes are padded on the right: padding belongs to no cluster.
            surprisal: -log p of each token given those before it, nats, of the plain model: for `preserve="surprisal"`.
            scores: of the tokens, by layer: for the rule "score".
            context: the protocol named so: all tokens before this place are merged at once when it is reached, none after it, and only what
                comes after it may be scored.
            soft: read by the soft mask, not the hard decision: no model that can be run with a compressed cache; to test gradients.

        Raises:
            MergeError: not calibrated for what it needs that for, something missing, another model, a layer with a merger, or a cache.

        Example:
            >>> import basin_lens as bl
            >>> model = bl.load_model()
            >>> tokens = model.to_tokens("The lamp hums, and the lamp hums in the wind.")
            >>> merger = bl.merging.TokenMerger(layers=[20], rule="stride", threshold=0.5, recent=4)
            >>> with merger.attached(model):
            ...     shape = model(tokens).shape
            >>> shape[1] == tokens.shape[1]
            True
        """
        o = self.ready(model).options
        if (o.preserve == "surprisal") != (surprisal is not None):
            raise MergeError("expected surprisal with preserve='surprisal', and only then. Give it, or use preserve='norm'.")
        if o.rule != "score" and scores is not None:
            raise MergeError(f"expected scores with the rule 'score' only, got them with {o.rule!r}. Leave them out.")
        made = Pass(self, valid=valid, surprisal=surprisal, scores=scores, context=context, soft=soft)
        made.check_given()
        with (
            alone_in(model, o.layers),
            measuring(model, gradients=torch.is_grad_enabled()),
            reading(model, made.readers()),
        ):
            self.pass_ = made
            try:
                yield self
            finally:
                self.pass_ = None

    def ready(self, model: Any) -> "TokenMerger":
        """Whether it can run, told by not raising.

        Raises:
            MergeError: not calibrated, attached, or made for another model.
        """
        o = self.prepare(model).options
        aimed = o.threshold is None and o.rule != "all"
        if (aimed or o.preserve != "none") and not self.calibrated:
            raise MergeError(
                f"expected a calibrated merger, for it has {'a target' if aimed else 'tokens to preserve'}, got one that is not. "
                "Call calibrate(model, tokens) first."
            )
        if self.pass_ is not None:
            raise MergeError("expected a merger that is not attached, got one that is. Leave its block first.")
        return self

    def calibrate(
        self, model: Any, tokens: Int[Tensor, "batch pos"], *, surprisal: Float[Tensor, "batch pos"] | None = None, context: int | None = None,
        scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None, valid: Bool[Tensor, "batch pos"] | None = None,
    ) -> "TokenMerger":  # fmt: skip
        """Center the states, find principal directions, quantiles, and the thresholds that meet the target, on these tokens.

        Texts that nothing is tested on. Layers are set in turn, each above those already merging, in one pass more (a few for `target_bytes`).
        A target is met within a token or two, or refused; the rule "random" meets it on average, and with `context` as near as that allows.

        Args:
            model: a hooked model.
            tokens: token ids, as long as the sequences that the target is meant for.
            surprisal: see `attached`.
            context: see `attached`.
            scores: see `attached`.
            valid: real tokens.

        Returns:
            itself.

        Raises:
            MergeError: a target that cannot be met, too few tokens, something missing, or attached.

        Example:
            >>> import basin_lens as bl
            >>> model = bl.load_model()
            >>> tokens = model.to_tokens("The lamp hums, and the lamp hums, and the lamp hums in the wind.")
            >>> merger = bl.merging.TokenMerger(layers=[10, 20], target_rate=0.25, recent=4).calibrate(model, tokens)
            >>> bool((merger.levels < 1).all())
            True
        """
        o = self.prepare(model).options
        aimed = o.target_rate is not None or o.target_bytes is not None
        if self.pass_ is not None:
            raise MergeError("expected a merger that is not attached, got one that is. Leave its block first.")
        if o.preserve == "surprisal" and surprisal is None:
            raise MergeError("expected surprisal with preserve='surprisal', got none. Give it to calibrate.")
        given: dict[str, Any] = {"valid": valid, "surprisal": surprisal, "scores": scores, "context": context}
        gathered = Pass(self, **given, soft=False)
        gathered.check_given(needed=aimed)
        with alone_in(model, o.layers), measuring(model):
            forward_pass(model, tokens, gathered.gatherers())
            gathered.settle(surprisal)

            def run(rates: dict[int, float]) -> list[dict[str, Any]]:
                tuned = Pass(self, **given, soft=False, rates=rates)
                forward_pass(model, tokens, tuned.readers())
                return tuned.noted

            if aimed:
                length = tokens.shape[1] if valid is None else round(float(valid.sum(1).float().mean()))
                meet_target(self, run, length, context)
        self.calibrated = True
        self.facts["calibration"] = {"tokens": int(tokens.numel()), "length": int(tokens.shape[1])}
        return self

    # ---- what happened ---------------------------------------------------------------------------------------------------------------

    def record(self, rows: list[dict[str, Any]], *, first: bool) -> None:
        """Called by a pass, layer by layer."""
        self._passes += first
        self._records += [{"pass": self._passes - 1, **row} for row in rows]

    def statistics(self) -> pd.DataFrame:
        """One row per pass and layer since the last `forget`.

        Columns: `pass`, `layer`, `sequences`, `tokens`, `eligible` (tokens that could have been merged), `merged`, `rate` (merged / tokens),
        `clusters`, `largest` (tokens in the largest cluster), `rows` (keys and values left at the end of the sequences), `bytes` and
        `full_bytes` (of the layer's cache then, with indices, sizes, descriptors and residuals; without merging), `level` (mean
        threshold, or the rule's level),
        `similarity` (mean cosine of merged tokens with their leader), `state_error` (squared distance of merged tokens' states from what stands
        for them, the leader's state or the cluster's mean, over that from the mean of all mergeable tokens; 1: no better than that mean).
        """
        return pd.DataFrame(self._records)

    def forget(self) -> None:
        """Empty the statistics."""
        self._records, self._passes = [], 0

    # ---- on disk ---------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Parameters as safetensors, options and provenance as JSON.

        Args:
            folder: made if missing; a merger that is there stays whole until the new one is.

        Returns:
            the folder.

        Raises:
            MergeError: not prepared. StoreError: the folder cannot be written.
        """
        if self.base is None:
            raise MergeError(
                "expected a merger prepared for a model, got one that saw none. Call prepare(model) or calibrate first."
            )
        target = Path(folder)
        held = save({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()})
        weights = f"{_WEIGHTS}-{hashlib.blake2b(held, digest_size=8).hexdigest()}.safetensors"
        facts = {"options": self.options.plain(), "base": self.base, "calibrated": self.calibrated, "facts": self.facts}
        record = _KIND.record(facts, {weights: records.digest(held)}, indent=1)
        try:
            with lock_folder(target):
                # The record goes last: it names its weights, so that until then the folder is the old merger.
                write_file(target / weights, held)
                write_file(target / RECORD, record)
                for old in target.glob(f"{_WEIGHTS}-*.safetensors"):
                    if old.name != weights:
                        old.unlink()
        except OSError as error:
            raise StoreError(f"expected a folder that can be written, got {str(target)!r}: {error}. Choose another.") from error
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any) -> "TokenMerger":
        """The merger of `save`, for the model it was made for.

        Args:
            folder: where it was saved.
            model: its base.

        Returns:
            the merger, which computes what the saved one did.

        Raises:
            StoreError: nothing there, not as it was saved, or of another version. MergeError: another model.
        """
        path = Path(folder)
        record = _KIND.read(path / RECORD, _FIELDS)
        if record["base"] != fingerprint(model):
            raise MergeError(
                f"expected the model that the merger in {str(path)!r} was made for ({record['base']}), got {full_name(model)} "
                f"({fingerprint(model)}). Load that model."
            )
        with _KIND.reading(path):
            ((weights, listed),) = record["files"].items()
            held = load_file(_KIND.check(path, weights, listed))
            merger = cls(**record["options"]).prepare(model)
            merger.load_state_dict(held)
            merger.calibrated, merger.facts = record["calibrated"], record["facts"]
        return merger
