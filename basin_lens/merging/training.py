"""Learning where to merge: thresholds, what moves them, the projection and the residual, by the language model's own loss."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from basin_lens.errors import MergeError
from basin_lens.files import lock_folder
from basin_lens.merging.losses import excess, plain_pass
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.merging.training_log import CHECKPOINT, append_log, refuse_other
from basin_lens.merging.training_options import Training
from basin_lens.merging.training_run import TrainingRun
from basin_lens.merging.windows import Windows, seen_of
from basin_lens.model import HookedModel, fingerprint, save_tuned
from basin_lens.values import hides_bars


@dataclass(frozen=True)
class Trained:
    """A trained merger. `model`: the base, or its trained copy. `history`: a row per step; `drift`: by how much the base's loss
    without merging rose on the held-out windows, nats per token; 0 for a frozen base, NaN without held-out windows."""

    merger: TokenMerger
    model: HookedModel
    history: pd.DataFrame
    drift: float


@torch.inference_mode(False)  # the caller's would make tensors that no gradient can pass
def train_merger(
    merger: TokenMerger,
    model: HookedModel,
    windows: Windows,
    held_out: Windows | None = None,
    *,
    training: Training | None = None,
    folder: str | os.PathLike[str] | None = None,
    also: Callable[[Trained], object] | None = None,
    progress: bool = True,
) -> Trained:
    """Train a calibrated merger on windows of text; the base model is frozen unless asked for.

    The loss of a step: cross-entropy of the model with merging (every position counts), plus `rate_weight` times the squared
    shortfall of the mean merge rate below its target, plus the contrastive hinge between clusters. The decision is hard in the
    forward pass, with the soft mask's gradient.

    Args:
        merger: calibrated; it is changed.
        model: a hooked model.
        windows: to train on.
        held_out: to evaluate on; windows that are copies of those to train on are left out.
        training: how.
        folder: where the log (JSON lines), checkpoints and the merger are kept; an interrupted training goes on from there with the
            same result.
        also: called with the result before the merger is written to the folder: for what belongs to it, as a figure. The merger
            comes last: where it is, all is.
        progress: show a bar.

    Returns:
        a `Trained`. `history` columns: `step`, `loss` and `plain_loss` (nats per token), `excess`, `rate` and `target` (merged /
        tokens, mean over layers), `contrastive`, `level` (mean threshold), `offset` and `event` (parachute), `bytes_share` (of the
        full cache, all layers), `held_out_excess` and `held_out_bytes_share` (where evaluated; merged less plain of the model as it
        then is).

    Raises:
        MergeError: nothing to learn, not calibrated, nothing held out but copies of what is trained on, or a loss that is not
        finite (the last checkpoint stays). StoreError: the folder holds another training, cannot be written, or is being written to
        by somebody else.

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
    if not merger.options.decision.learned:
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
                f"expected held-out windows of other texts, got {copied} that are copies of windows to train on. Hold other texts "
                "out."
            )
    with nullcontext() if folder is None else lock_folder(folder):
        run = TrainingRun(merger, model, windows, training)
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


def _go(run: TrainingRun, held_out: Windows | None, folder: Path | None, progress: bool) -> None:
    """From the folder's checkpoint, or from the start, to the last step."""
    merger, model, training = run.merger, run.model, run.training
    if folder is not None:
        run.resume(folder)
    # Of the model that is run: a base that is trained moves, and its gain must not hide what merging costs.
    watched = held_out is not None and bool(training.evaluate_every)
    before = plain_pass(model, held_out) if held_out is not None and watched and not training.train_base else None
    try:
        with tqdm(
            total=training.steps, initial=run.step, desc="training the merger", unit="step", disable=hides_bars(progress)
        ) as bar:
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


def _finished(run: TrainingRun, model: HookedModel, held_out: Windows | None, copied: int) -> Trained:
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
