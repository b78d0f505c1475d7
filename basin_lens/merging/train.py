"""Learning where to merge: thresholds, what moves them, the projection and the residual, by the language model's own loss."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens import records
from basin_lens.capture.passes import token_losses
from basin_lens.errors import MergeError, StoreError
from basin_lens.files import lock_folder, write_file
from basin_lens.merging.hook import TokenMerger
from basin_lens.merging.logs import CHECKPOINT, append_log, refuse_other, rewrite_log
from basin_lens.merging.parameters import frozen
from basin_lens.merging.windows import Windows, as_surprisal, excess, plain_pass, seen_of, share_left, surprisal_for
from basin_lens.model import copy_of, device_of, fingerprint, forward_pass, measuring, parameters_of, save_tuned
from basin_lens.values import Whole, whole_fields

_KIND = records.Kind("a checkpoint", "basin_lens merge training 1", "Delete it to begin anew.")


@dataclass(frozen=True)
class Training:
    """How to train a merger: AdamW; thresholds have their own learning rate, both fall as a half cosine to a tenth.

    Args:
        steps: optimizer steps.
        batch_size: windows per pass.
        accumulate: passes per step.
        threshold_rate: learning rate of thresholds and what moves them (on their logits).
        learning_rate: of projection and residual.
        base_rate: of the base model, if it is trained.
        rate_weight: weight of the squared shortfall of the mean merge rate below its target (one-sided: more merging is not punished).
        clip: largest norm of the gradient.
        evaluate_every: steps between evaluations on held-out windows; 0: none.
        checkpoint_every: steps between checkpoints, if a folder is given.
        train_base: train the base model as well (a copy of it).
        seed: of the order of the windows; nothing else is random.
    """

    steps: Whole = 60
    batch_size: Whole = 4
    accumulate: Whole = 1
    threshold_rate: float = 0.05
    learning_rate: float = 1e-3
    base_rate: float = 1e-5
    rate_weight: float = 50.0
    clip: float = 1.0
    evaluate_every: Whole = 20
    checkpoint_every: Whole = 20
    train_base: bool = False
    seed: Whole = 0

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        good = min(self.steps, self.batch_size, self.accumulate, self.checkpoint_every) >= 1 and self.evaluate_every >= 0
        if not (good and min(self.threshold_rate, self.learning_rate, self.base_rate, self.rate_weight, self.clip) > 0):
            raise MergeError(f"expected counts of 1 or more and rates above 0, got {self}. Change the training.")

    def factor(self, step: int) -> float:
        """Share of the learning rates at a step."""
        return 0.1 + 0.9 * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass
class Parachute:
    """Backs off when merging suddenly costs more, and relaxes when it no longer does.

    It sees the excess loss of the batch (merged less plain, the same tokens), in nats per token. Above the running mean by `spike`, all
    thresholds
    move a part of the way to 1; once the excess is back within a quarter of `spike`, they return in half steps. After each event it waits.
    """

    spike: float = 0.5
    part: float = 0.2
    wait: int = 3
    keep: float = 0.9
    mean: float = float("nan")
    offset: float = 0.0
    resting: int = 0

    def see(self, value: float) -> str | None:
        """Take a batch's excess; the event, if there is one: `"back off"` or `"relax"`."""
        if math.isnan(self.mean):
            self.mean = value
        event = None
        if self.resting:
            self.resting -= 1
        elif value > self.mean + self.spike and self.offset < 0.95:
            self.offset, event = self.offset + self.part * (1 - self.offset), "back off"
        elif self.offset > 0 and value <= self.mean + self.spike / 4:
            self.offset, event = max(0.0, self.offset - self.part / 2), "relax"
        if event is not None:
            self.resting = self.wait
        # A spike must not become what is normal at once.
        self.mean = self.keep * self.mean + (1 - self.keep) * min(value, self.mean + self.spike)
        return event


@dataclass(frozen=True)
class Trained:
    """A trained merger. `model`: the base, or its trained copy. `history`: a row per step; `drift`: by how much the base's loss without merging
    rose on the held-out windows, nats per token; 0 for a frozen base, NaN without held-out windows."""

    merger: TokenMerger
    model: Any
    history: pd.DataFrame
    drift: float


@torch.inference_mode(False)  # the caller's would make tensors that no gradient can pass
def train_merger(
    merger: TokenMerger,
    model: Any,
    windows: Windows,
    held_out: Windows | None = None,
    *,
    training: Training | None = None,
    folder: str | os.PathLike[str] | None = None,
    also: Callable[[Trained], object] | None = None,
    progress: bool = True,
) -> Trained:
    """Train a calibrated merger on windows of text; the base model is frozen unless asked for.

    The loss of a step: cross-entropy of the model with merging (every position counts), plus `rate_weight` times the squared shortfall of the
    mean merge rate below its target, plus the contrastive hinge between clusters. The decision is hard in the forward pass, with the soft
    mask's gradient.

    Args:
        merger: calibrated; it is changed.
        model: a hooked model.
        windows: to train on.
        held_out: to evaluate on; windows that are copies of those to train on are left out.
        training: how.
        folder: where the log (JSON lines), checkpoints and the merger are kept; an interrupted training goes on from there with the same result.
        also: called with the result before the merger is written to the folder: for what belongs to it, as a figure. The merger comes last: where
            it is, all is.
        progress: show a bar.

    Returns:
        a `Trained`. `history` columns: `step`, `loss` and `plain_loss` (nats per token), `excess`, `rate` and `target` (merged / tokens,
        mean over layers),
        `contrastive`, `level` (mean threshold), `offset` and `event` (parachute), `bytes_share` (of the full cache, all layers),
        `held_out_excess` and `held_out_bytes_share` (where evaluated; merged less plain of the model as it then is).

    Raises:
        MergeError: nothing to learn, not calibrated, nothing held out but copies of what is trained on, or a loss that is not finite (the last
        checkpoint stays). StoreError: the folder holds another training, cannot be written, or is being written to by somebody else.

    Source: Bonnaerens and Dambre 2023 (learned thresholds token merging); Nawrot et al. 2024 (one-sided compression target).

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.merging import Training, TokenMerger, train_merger, windows_of
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = TokenMerger([20], target_rate=0.3).calibrate(model, windows.tokens)
        >>> made = train_merger(merger, model, windows, training=Training(steps=1, batch_size=2), progress=False)
        >>> len(made.history)
        1
    """
    training = training or Training()
    merger.prepare(model)
    if not merger.options.learned:
        raise MergeError(f"expected rule cosine or adjacent, whose thresholds can be learned, got {merger.options.rule!r}.")
    if not merger.calibrated:
        raise MergeError("expected a calibrated merger, got one without. Call calibrate(model, windows.tokens) first.")
    if len(windows) < training.batch_size:
        raise MergeError(
            f"expected at least a batch of {training.batch_size} windows, got {len(windows)}. Give more text, or a smaller batch."
        )
    copied = 0
    if held_out is not None:
        held_out, copied = held_out.without_copies_of(windows)
        if not len(held_out):
            raise MergeError(
                f"expected held-out windows of other texts, got {copied} that are copies of windows to train on. Hold other texts out."
            )
    with nullcontext() if folder is None else lock_folder(folder):
        run = _Run(merger, model, windows, training)
        if folder is not None:
            refuse_other(Path(folder), run.key)
        _go(run, held_out, None if folder is None else Path(folder), progress)
        made = _finished(run, model, held_out, copied)
        if also is not None:
            also(made)
        if folder is not None:
            if training.train_base:
                save_tuned(run.model, Path(folder) / "base", model, {"drift": merger.facts["training"]["drift"]})
            merger.save(folder)
            (Path(folder) / CHECKPOINT).unlink(missing_ok=True)
    return made


def _go(run: "_Run", held_out: Windows | None, folder: Path | None, progress: bool) -> None:
    """From the folder's checkpoint, or from the start, to the last step."""
    merger, model, training = run.merger, run.model, run.training
    if folder is not None:
        run.resume(folder)
    # Of the model that is run: a base that is trained moves, and its gain must not hide what merging costs.
    watched = held_out is not None and bool(training.evaluate_every)
    before = plain_pass(model, held_out) if held_out is not None and watched and not training.train_base else None
    try:
        with tqdm(total=training.steps, initial=run.step, desc="training the merger", unit="step", disable=not progress) as bar:
            while run.step < training.steps:
                if folder is not None and run.step % training.checkpoint_every == 0 and run.step:
                    run.keep(folder)
                record = run.take()
                due = watched and (run.step % training.evaluate_every == 0 or run.step == training.steps)
                if due and held_out is not None:
                    seen = excess(merger, run.model, held_out, before or plain_pass(run.model, held_out))
                    record |= {
                        "held_out_excess": float(seen["excess"].mean()),
                        "held_out_bytes_share": float(seen["bytes_share"].mean()),
                    }
                run.history.append(record)
                if folder is not None:
                    append_log(folder, record)
                bar.set_postfix_str(f"excess {record['excess']:+.3f}, rate {record['rate']:.2f}")
                bar.update()
    finally:
        merger.base_changes = False  # interrupted or done: from here on another model is another model
    merger.forget()


def _finished(run: "_Run", model: Any, held_out: Windows | None, copied: int) -> Trained:
    """The merger with what is to be known of its training, its parameters frozen."""
    merger, training, windows = run.merger, run.training, run.windows
    drift = math.nan if training.train_base else 0.0
    if training.train_base and held_out is not None:
        drift = float((plain_pass(run.model, held_out, keep=False).losses - plain_pass(model, held_out, keep=False).losses).mean())
    if training.train_base:
        merger.base = fingerprint(run.model)
    merger.facts["training"] = asdict(training) | {
        "windows": len(windows),
        "length": int(windows.tokens.shape[1]),
        "key": run.key,
        "seen": windows.digests(),
        "seen_texts": sorted(set(windows.source)),
        "seen_runs": seen_of(windows),
        "held_out_copies": copied,
        "pieces": windows.pieces,
        "drift": None if math.isnan(drift) else drift,
    }
    for parameter in merger.parameters():
        parameter.requires_grad_(False)
    return Trained(merger, run.model, pd.DataFrame(run.history), drift)


class _Run:
    """Parameters, optimizer, parachute and history between two steps."""

    def __init__(self, merger: TokenMerger, model: Any, windows: Windows, training: Training) -> None:
        self.merger, self.training, self.windows = merger, training, windows
        self.model = copy_of(model) if training.train_base else model
        self.target = self._target()
        for parameter in merger.parameters():
            parameter.requires_grad_(True)
        slow = [p for p in (merger.raw, merger.slope) if p is not None]
        own = [p for p in merger.parameters() if not any(p is s for s in slow)]
        groups: list[dict[str, Any]] = [
            {"params": slow, "lr": training.threshold_rate},
            {"params": own, "lr": training.learning_rate},
        ]
        self.base = parameters_of(self.model) if training.train_base else {}
        merger.base_changes = training.train_base
        if self.base:
            groups.append({"params": list(self.base.values()), "lr": training.base_rate})
        self.frozen = [p for p in parameters_of(self.model).values() if p.requires_grad and not self.base]
        for parameter in self.base.values():
            parameter.requires_grad_(True)
        self.rates = [float(group["lr"]) for group in groups]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        self.rates = [rate for rate, group in zip(self.rates, groups, strict=True) if group["params"]]
        self.parachute = Parachute()
        self.step = 0
        self.history: list[dict[str, Any]] = []
        told = [asdict(training), merger.options.plain(), merger.base, windows.tokens.tolist(), merger.raw.detach().tolist()]
        self.key = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    def _target(self) -> float:
        """Mean merge rate over the layers: what was asked for, or what calibration gives on the first batch."""
        o = self.merger.options
        if o.target_rate is not None:
            return o.target_rate
        tokens = self.windows.tokens[: self.training.batch_size].to(device_of(self.model))
        self.merger.forget()
        surprisal = surprisal_for(self.merger, self.model, tokens)
        with self.merger.attached(self.model, surprisal=surprisal), torch.no_grad():
            forward_pass(self.model, tokens, {})
        found = float(self.merger.statistics()["rate"].mean())
        self.merger.forget()
        return found

    def _rows(self, number: int) -> list[int]:
        """Windows of a pass: epoch after epoch, each in its own order."""
        n, size = len(self.windows), self.training.batch_size
        per_epoch = n // size
        epoch, at = divmod(number, per_epoch)
        order = np.random.default_rng((self.training.seed, epoch)).permutation(n)
        return order[at * size : (at + 1) * size].tolist()

    def take(self) -> dict[str, Any]:
        """One optimizer step; its record."""
        t, merger = self.training, self.merger
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * t.factor(self.step)
        merger.offset.fill_(self.parachute.offset)
        merger.forget()
        sums = dict.fromkeys(("loss", "plain_loss", "rate", "contrastive"), 0.0)
        for part in range(t.accumulate):
            tokens = self.windows.tokens[self._rows(self.step * t.accumulate + part)].to(device_of(self.model))
            with measuring(self.model):
                losses = token_losses(forward_pass(self.model, tokens, {}), tokens)
            plain = float(losses.mean())
            surprisal = as_surprisal(losses) if merger.options.preserve == "surprisal" else None
            with torch.enable_grad(), self._only_ours():
                with merger.attached(self.model, surprisal=surprisal):
                    loss = token_losses(forward_pass(self.model, tokens, {}), tokens).mean()
                    assert merger.pass_ is not None
                    merged = torch.stack([share.mean() for share in merger.pass_.share.values()]).mean()
                    hinge = self._contrast()
                total = (
                    loss + t.rate_weight * (self.target - merged).clamp(min=0).square() + merger.options.contrastive_weight * hinge
                )
                if not math.isfinite(float(total.detach())):
                    raise MergeError(
                        f"expected a finite loss at step {self.step} of {t.steps}, got {float(total.detach())}: training was stopped; the last "
                        "checkpoint stays. Lower the learning rates."
                    )
                (total / t.accumulate).backward()
            for name, value in zip(sums, (float(loss.detach()), plain, float(merged.detach()), float(hinge.detach())), strict=True):
                sums[name] += value / t.accumulate
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], t.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        cost = sums["loss"] - sums["plain_loss"]
        event = self.parachute.see(cost)
        merger.offset.fill_(self.parachute.offset)
        held = merger.statistics()
        self.step += 1
        return {
            "step": self.step, **sums, "excess": cost, "target": self.target, "level": float(held["level"].mean()),
            "bytes_share": share_left(merger, held), "offset": self.parachute.offset, "event": event,
            "excess_mean": self.parachute.mean,
        }  # fmt: skip

    def _only_ours(self) -> AbstractContextManager[None]:
        return frozen(self.frozen)

    def _contrast(self) -> Float[Tensor, ""]:
        """Hinge on the cosine between clusters of one sequence, mean over pairs; a cluster is its leader, or its mean if that represents it."""
        merger = self.merger
        total = torch.zeros((), device=device_of(self.model))
        if not merger.options.contrastive_weight:
            return total
        assert merger.pass_ is not None
        for layer, units in merger.pass_.units.items():
            found = merger.pass_.assigned[layer]
            length = units.shape[1]
            leads = (found.since < length) & ~found.joined
            pairs = (
                leads[:, :, None] & leads[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=units.device).tril(-1)
            )
            if merger.options.representative == "mean":
                own = torch.arange(length, device=units.device).expand(found.joined.shape)
                home = torch.where(found.joined & (found.leader >= 0), found.leader, own)
                units = torch.zeros_like(units).scatter_add(1, home[..., None].expand_as(units), units)
                units = units / units.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            over = (units @ units.transpose(1, 2) - merger.options.margin).clamp(min=0)
            total = total + (over * pairs).sum() / pairs.sum().clamp(min=1)
        return total / len(merger.pass_.units)

    # ---- on disk ---------------------------------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {f"merger.{n}": p for n, p in self.merger.named_parameters()}
        return own | {f"base.{n}": p for n, p in self.base.items()}

    def keep(self, folder: Path) -> None:
        """The state before the next step, in one file that replaces the last one when it is whole."""
        held: dict[str, Tensor] = {}
        for name, parameter in self._named().items():
            held[f"value/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                held[f"{key}/{name}"] = value.detach().cpu().contiguous()
        facts = {
            "training": self.key, "step": str(self.step), "target": repr(self.target), "history": json.dumps(self.history),
            "parachute": json.dumps(asdict(self.parachute)),
        }  # fmt: skip
        try:
            write_file(folder / CHECKPOINT, lambda path: _KIND.write_tensors(path, held, facts))
        except SafetensorError as error:
            raise StoreError(f"expected a folder that can be written, got {str(folder)!r}: {error}. Choose another.") from error

    def resume(self, folder: Path) -> None:
        """Go on from the folder's checkpoint, if it holds one; the log is cut to it.

        Raises:
            StoreError: of another training, or damaged.
        """
        path = folder / CHECKPOINT
        if path.exists():
            with _KIND.tensors(path) as (held, facts):
                if facts.get("training") != self.key:
                    raise StoreError(
                        f"expected a checkpoint of this training ({self.key}), got {str(path)!r} of another "
                        f"({facts.get('training')}): other texts, options or base model. Choose another folder, or delete it."
                    )
                self._take_up(held, facts)
        rewrite_log(folder, self.history)

    def _take_up(self, held: Any, facts: Mapping[str, str]) -> None:
        """Go on from a checkpoint that is open; nothing is changed by one that does not fit.

        Raises:
            ValueError, KeyError, TypeError, SafetensorError: it does not.
        """
        names, named = set(held.keys()), self._named()
        step, target, history = int(facts["step"]), float(facts["target"]), json.loads(facts["history"])
        parachute = Parachute(**json.loads(facts["parachute"]))
        if len(history) != step or [row["step"] for row in history] != list(range(1, step + 1)):
            raise ValueError(f"a history of {len(history)} steps at step {step}")
        keys = {name: [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in names] for name in named}
        for name, parameter in named.items():
            for key in ("value", *(k for k in keys[name] if k != "step")):
                if tuple(held.get_slice(f"{key}/{name}").get_shape()) != tuple(parameter.shape):
                    raise ValueError(f"{key} of {name} in another shape")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(held.get_tensor(f"value/{name}"))
                if keys[name]:
                    self.optimizer.state[parameter] = {k: held.get_tensor(f"{k}/{name}").to(parameter.device) for k in keys[name]}
                    self.optimizer.state[parameter]["step"] = held.get_tensor(f"step/{name}")
        self.step, self.target, self.history, self.parachute = step, target, history, parachute
