"""Token merging inside a running model: hooks that let attention read clusters, and are gone afterwards."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsIndex

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from basin_lens.errors import MergeError, MergeWarning
from basin_lens.merging.calibration import calibrate_parameters
from basin_lens.merging.merge_pass import Given, MergePass, alone_in
from basin_lens.merging.merger_files import read_merger, write_merger
from basin_lens.merging.options import Options, options_of
from basin_lens.merging.parameters import Parameters, check_able, shape_of
from basin_lens.merging.statistics import Row, statistics_table
from basin_lens.model import HookedModel, check_model, fingerprint, full_name, measuring, reading
from basin_lens.values import Facts, card


class TokenMerger(nn.Module):
    """Causal token merging: in chosen layers, a new token joins the cluster of an earlier one, and attention reads the cluster
    once.

    Streaming protocol. When `recent` more tokens have come, a token is compared with the clusters made before it; it joins the most
    similar one if the similarity reaches the threshold, else it opens one. From then on queries read the cluster in its place: one
    key (the leader's, with its rotary position), one value, log(size) on the logit. What an earlier query read never changes,
    position 0 and the recent window stay raw, and nothing is shared between sequences. The similarity is the cosine of the states
    that enter the layer, centered by calibration (and projected), mixed with that of the attention rows.

    Args:
        layers: where to merge.
        options: a threshold or a target, and how; see `basin_lens.merging.Options`.

    Raises:
        MergeError: options that do not fit.

    Source: online leader clustering (Hartigan 1975); Bolya et al. 2023 (token merging, size on the logit); Nawrot et al. 2024
    (dynamic memory compression); Bonnaerens and Dambre 2023 (learned thresholds).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> merger = bl.merging.TokenMerger(layers=[10, 20], threshold=0.8)
        >>> with merger.attached(model):
        ...     logits = model("The lamp hums in the north wind, and the keeper counts the waves. " * 6)
        >>> merger.statistics().layer.tolist()
        [10, 20]
    """

    weights: Parameters  # made by `prepare`, when the model is known

    def __init__(self, layers: Iterable[object] | SupportsIndex, **options: object) -> None:
        super().__init__()
        self.options = options_of(layers, options)
        self.base: str | None = None  # fingerprint of the model that it was prepared for
        self.base_changes = False  # while the base model is trained
        self.calibrated = False
        self.facts: Facts = {}
        self.pass_: MergePass | None = None  # inside a block of `attached`
        self._noted: list[Row] = []

    def __repr__(self) -> str:
        return f"TokenMerger({'; '.join(self._said().values())})"

    def _repr_html_(self) -> str:
        return card("TokenMerger", self._said())

    def _said(self) -> dict[str, str]:
        """What it is, in words, by what is asked."""
        o, usual = self.options.plain(), Options(layers=self.options.layers, threshold=0.5).plain()
        chosen = [
            f"{name} {value}" for name, value in o.items() if value != usual[name] or (name == "threshold" and value is not None)
        ]
        said = {
            "merges": f"layers {', '.join(map(str, self.options.layers))}, {', '.join(chosen)}",
            "made for": "no model yet" if self.base is None else f"model {self.base}",
            "calibrated": "calibrated" if self.calibrated else "not calibrated",
        }
        if self._noted:
            merged, tokens = (sum(row[name] for row in self._noted) for name in ("merged", "tokens"))
            taken, full = _bytes(self._noted)
            said["so far"] = f"{merged} of {tokens} tokens merged, {taken:,} bytes of cache for {full:,} without merging"
        return said

    # ---- one model ---------------------------------------------------------------------------------------------------------------

    def prepare(self, model: HookedModel) -> "TokenMerger":
        """Make the parameters for this model; nothing if that was done.

        Raises:
            MergeError: another model than before, layers or points it does not have, or attention that does not obey its pattern.
        """
        if self.base_changes and self.base is not None:
            return self
        check_model(model)
        name = fingerprint(model)
        if self.base is None:
            check_able(model, self.options)
            self.weights = Parameters(self.options, shape_of(model))
            self.base = name
        elif self.base != name:
            raise MergeError(
                f"expected the model that this merger was made for ({self.base}), got {full_name(model)} ({name}). Make another "
                "merger."
            )
        return self

    def ready(self, model: HookedModel) -> "TokenMerger":
        """Prepare, and refuse to run what cannot.

        Raises:
            MergeError: not calibrated, attached, or made for another model.
        """
        o = self.prepare(model).options
        aimed = o.threshold is None and o.decision.has_level
        if (aimed or o.preserve != "none") and not self.calibrated:
            raise MergeError(
                f"expected a calibrated merger, for it has {'a target' if aimed else 'tokens to preserve'}, got one that is not. "
                "Call calibrate(model, tokens) first."
            )
        self._check_free()
        return self

    def _check_free(self) -> None:
        if self.pass_ is not None:
            raise MergeError("expected a merger that is not attached, got one that is. Leave its block first.")

    @property
    def levels(self) -> Float[Tensor, " layers"]:
        """The threshold of each merged layer, or what its rule calls its level; prepared for a model."""
        return self.weights.levels

    # ---- running -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(
        self,
        model: HookedModel,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        surprisal: Float[Tensor, "batch pos"] | None = None,
        scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None,
        context: int | None = None,
        soft: bool = False,
    ) -> Iterator["TokenMerger"]:
        """Every pass inside the block merges; the hooks are gone after it, also on errors.

        Passes are over whole sequences, and so is `model.generate(use_past_kv_cache=False)`; `basin_lens.merging.generate` keeps a
        compressed cache. Attention is eager and dropout is off inside.

        Args:
            model: a hooked model.
            valid: real tokens, if the passes are padded on the right: padding belongs to no cluster.
            surprisal: -log p of each token given those before it, nats, of the plain model: for `preserve="surprisal"`.
            scores: of the tokens, by layer: for the rule "score".
            context: the protocol named so: all tokens before this place are merged at once when it is reached, none after it, and
                only what comes after it may be scored.
            soft: read by the soft mask, not the hard decision: no model that can be run with a compressed cache; to test gradients.

        Raises:
            MergeError: not calibrated for what it needs that for, something missing, another model, a layer with a merger, or a
                cache.

        Warns:
            MergeWarning: what clusters keep takes more bytes than merging saves.

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
        given = Given(valid, surprisal, scores, context)
        given.check_pass(o)
        made = MergePass(o, self.weights, given, soft=soft)
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
                self._noted += made.noted
        taken, full = _bytes(made.noted)
        if taken > full:
            warnings.warn(
                f"This merger takes {taken:,} bytes of cache in its layers for {full:,} without merging: too few tokens merge to "
                "pay for what clusters keep. Give longer texts, a lower threshold or target_bytes=.",
                MergeWarning,
                stacklevel=3,
            )

    def calibrate(
        self,
        model: HookedModel,
        tokens: Int[Tensor, "batch pos"],
        *,
        surprisal: Float[Tensor, "batch pos"] | None = None,
        context: int | None = None,
        scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None,
        valid: Bool[Tensor, "batch pos"] | None = None,
    ) -> "TokenMerger":
        """Center the states, find principal directions, quantiles, and the thresholds that meet the target, on these tokens.

        Texts that nothing is tested on. Layers are set in turn, each above those already merging, in one pass more (a few for
        `target_bytes`). A target is met within a token or two, or refused; the rule "random" meets it on average, and with
        `context` as near as that allows.

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
        self.prepare(model)
        self._check_free()
        calibrate_parameters(self.weights, model, tokens, Given(valid, surprisal, scores, context))
        self.calibrated = True
        self.facts["calibration"] = {"tokens": int(tokens.numel()), "length": int(tokens.shape[1])}
        return self

    # ---- what happened -----------------------------------------------------------------------------------------------------------

    def statistics(self) -> pd.DataFrame:
        """One row per pass and layer since the last `forget`.

        Columns: `pass`, `layer`, `sequences`, `tokens`, `eligible` (tokens that could have been merged), `merged`, `rate` (merged /
        tokens), `clusters`, `largest` (tokens in the largest cluster), `rows` (keys and values left at the end of the sequences),
        `bytes` and `full_bytes` (of the layer's cache then, with indices, sizes, descriptors and residuals; without merging),
        `level` (mean threshold, or the rule's level),
        `similarity` (mean cosine of merged tokens with their leader), `state_error` (squared distance of merged tokens' states from
        what stands for them, the leader's state or the cluster's mean, over that from the mean of all mergeable tokens; 1: no
        better than that mean).
        """
        return statistics_table(self._noted + ([] if self.pass_ is None else self.pass_.noted))

    def forget(self) -> None:
        """Empty the statistics."""
        self._noted = []
        if self.pass_ is not None:
            self.pass_.noted.clear()

    # ---- on disk -----------------------------------------------------------------------------------------------------------------

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
        facts = {"options": self.options.plain(), "base": self.base, "calibrated": self.calibrated, "facts": self.facts}
        return write_merger(Path(folder), self.weights, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: HookedModel) -> "TokenMerger":
        """The merger of `save`, for the model it was made for.

        Args:
            folder: where it was saved.
            model: its base.

        Returns:
            the merger, which computes what the saved one did.

        Raises:
            StoreError: nothing there, not as it was saved, or of another version. MergeError: another model.
        """
        with read_merger(Path(folder), model) as (record, held):
            merger = cls(**record["options"]).prepare(model)
            merger.weights.load_state_dict(held)
            merger.calibrated, merger.facts = record["calibrated"], record["facts"]
        return merger


def _bytes(rows: Iterable[Row]) -> tuple[int, int]:
    """Of the cache with merging and without."""
    held = list(rows)
    return sum(int(row["bytes"]) for row in held), sum(int(row["full_bytes"]) for row in held)
