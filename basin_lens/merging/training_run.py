"""A training between two steps: parameters, optimizer, parachute and history, and their checkpoint."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from basin_lens import records
from basin_lens.capture.passes import token_losses
from basin_lens.errors import MergeError, StoreError
from basin_lens.files import write_file
from basin_lens.merging.losses import as_surprisal, share_left, surprisal_for
from basin_lens.merging.parachute import Parachute
from basin_lens.merging.parameters import frozen
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.merging.training_log import CHECKPOINT, rewrite_log
from basin_lens.merging.training_options import Training
from basin_lens.merging.windows import Windows
from basin_lens.model import HookedModel, copy_of, device_of, forward_pass, measuring, parameters_of
from basin_lens.values import Facts

_KIND = records.Kind("a checkpoint", "basin_lens merge training 1", "Delete it to begin anew.")


def contrastive_hinge(merger: TokenMerger) -> Float[Tensor, ""]:
    """Hinge on the cosine between clusters of one sequence, mean over pairs; a cluster is its leader, or its mean if that
    represents it.

    Of the passes inside the merger's block.
    """
    total = torch.zeros((), device=merger.weights.raw.device)
    if not merger.options.contrastive_weight:
        return total
    assert merger.pass_ is not None
    for layer, units in merger.pass_.units.items():
        found = merger.pass_.assigned[layer]
        length = units.shape[1]
        leads = (found.since < length) & ~found.joined
        before = torch.ones(length, length, dtype=torch.bool, device=units.device).tril(-1)
        pairs = leads[:, :, None] & leads[:, None, :] & before
        if merger.options.representative == "mean":
            own = torch.arange(length, device=units.device).expand(found.joined.shape)
            home = torch.where(found.joined & (found.leader >= 0), found.leader, own)
            units = torch.zeros_like(units).scatter_add(1, home[..., None].expand_as(units), units)
            units = units / units.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        over = (units @ units.transpose(1, 2) - merger.options.margin).clamp(min=0)
        total = total + (over * pairs).sum() / pairs.sum().clamp(min=1)
    return total / len(merger.pass_.units)


class TrainingRun:
    """Parameters, optimizer, parachute and history between two steps.

    Args:
        merger: calibrated; its parameters are trained.
        model: its base; a copy of it is trained if that is asked for.
        windows: to train on.
        training: how.
    """

    def __init__(self, merger: TokenMerger, model: HookedModel, windows: Windows, training: Training) -> None:
        self.merger, self.training, self.windows = merger, training, windows
        self.model = copy_of(model) if training.train_base else model
        self.target = self._target()
        for parameter in merger.parameters():
            parameter.requires_grad_(True)
        slow = [p for p in (merger.weights.raw, merger.weights.slope) if p is not None]
        own = [p for p in merger.parameters() if not any(p is s for s in slow)]
        groups = [(slow, training.threshold_rate), (own, training.learning_rate)]
        self.base = parameters_of(self.model) if training.train_base else {}
        merger.base_changes = training.train_base
        if self.base:
            groups.append((list(self.base.values()), training.base_rate))
        groups = [(parameters, rate) for parameters, rate in groups if parameters]
        self.frozen = [p for p in parameters_of(self.model).values() if p.requires_grad and not self.base]
        for parameter in self.base.values():
            parameter.requires_grad_(True)
        self.rates = [float(rate) for _, rate in groups]
        self.optimizer = torch.optim.AdamW([{"params": held, "lr": rate} for held, rate in groups], weight_decay=0.0)
        self.parachute = Parachute()
        self.step = 0
        self.history: list[Facts] = []
        facts = [
            asdict(training),
            merger.options.plain(),
            merger.base,
            windows.tokens.tolist(),
            merger.weights.raw.detach().tolist(),
        ]
        self.key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

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

    def take(self) -> Facts:
        """One optimizer step; its record."""
        t, weights = self.training, self.merger.weights
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * t.factor(self.step)
        weights.offset.fill_(self.parachute.offset)
        self.merger.forget()
        sums = dict.fromkeys(("loss", "plain_loss", "rate", "contrastive"), 0.0)
        for part in range(t.accumulate):
            for name, value in self._learn_from(self._rows(self.step * t.accumulate + part)).items():
                sums[name] += value / t.accumulate
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], t.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        cost = sums["loss"] - sums["plain_loss"]
        event = self.parachute.see(cost)
        weights.offset.fill_(self.parachute.offset)
        held = self.merger.statistics()
        self.step += 1
        return {
            "step": self.step,
            **sums,
            "excess": cost,
            "target": self.target,
            "level": float(held["level"].mean()),
            "bytes_share": share_left(self.merger, held),
            "offset": self.parachute.offset,
            "event": event,
            "excess_mean": self.parachute.mean,
        }

    def _learn_from(self, rows: list[int]) -> dict[str, float]:
        """Add the gradients of one pass; its losses and its merge rate."""
        t, merger = self.training, self.merger
        tokens = self.windows.tokens[rows].to(device_of(self.model))
        with measuring(self.model):
            losses = token_losses(forward_pass(self.model, tokens, {}), tokens)
        plain = float(losses.mean())
        surprisal = as_surprisal(losses) if merger.options.preserve == "surprisal" else None
        with torch.enable_grad(), frozen(self.frozen):
            with merger.attached(self.model, surprisal=surprisal):
                loss = token_losses(forward_pass(self.model, tokens, {}), tokens).mean()
                assert merger.pass_ is not None
                merged = torch.stack([share.mean() for share in merger.pass_.share.values()]).mean()
                hinge = contrastive_hinge(merger)
            shortfall = (self.target - merged).clamp(min=0)
            total = loss + t.rate_weight * shortfall.square() + merger.options.contrastive_weight * hinge
            if not math.isfinite(float(total.detach())):
                raise MergeError(
                    f"expected a finite loss at step {self.step} of {t.steps}, got {float(total.detach())}: training was stopped; "
                    "the last checkpoint stays. Lower the learning rates."
                )
            (total / t.accumulate).backward()
        found = {"loss": loss, "rate": merged, "contrastive": hinge}
        return {name: float(value.detach()) for name, value in found.items()} | {"plain_loss": plain}

    # ---- on disk -----------------------------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {f"merger.{n}": p for n, p in self.merger.weights.named_parameters()}
        return own | {f"base.{n}": p for n, p in self.base.items()}

    def keep(self, folder: Path) -> None:
        """The state before the next step, in one file that replaces the last one when it is whole."""
        held: dict[str, Tensor] = {}
        for name, parameter in self._named().items():
            held[f"value/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                held[f"{key}/{name}"] = value.detach().cpu().contiguous()
        facts = {
            "training": self.key,
            "step": str(self.step),
            "target": repr(self.target),
            "history": json.dumps(self.history),
            "parachute": json.dumps(asdict(self.parachute)),
        }
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
                self._take_up(set(held.keys()), held.get_tensor, facts)
        rewrite_log(folder, self.history)

    def _take_up(self, names: Set[str], tensor: Callable[[str], Tensor], facts: Mapping[str, str]) -> None:
        """Go on from a checkpoint that is open; nothing is changed by one that does not fit.

        Raises:
            ValueError, KeyError, TypeError, SafetensorError: it does not.
        """
        named = self._named()
        step, target, history = int(facts["step"]), float(facts["target"]), json.loads(facts["history"])
        parachute = Parachute(**json.loads(facts["parachute"]))
        if len(history) != step or [row["step"] for row in history] != list(range(1, step + 1)):
            raise ValueError(f"a history of {len(history)} steps at step {step}")
        keys = {name: [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in names] for name in named}
        for name, parameter in named.items():
            for key in ("value", *(k for k in keys[name] if k != "step")):
                if tensor(f"{key}/{name}").shape != parameter.shape:
                    raise ValueError(f"{key} of {name} in another shape")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensor(f"value/{name}"))
                if keys[name]:
                    self.optimizer.state[parameter] = {k: tensor(f"{k}/{name}").to(parameter.device) for k in keys[name]}
                    self.optimizer.state[parameter]["step"] = tensor(f"step/{name}")
        self.step, self.target, self.history, self.parachute = step, target, history, parachute
