"""Training a model on some texts, each as often as it should be: deterministic, resumable, and stopped before it diverges."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from basin_lens import records
from basin_lens.capture.passes import token_losses
from basin_lens.errors import StoreError, StudyError
from basin_lens.files import clear_leavings, lock_folder, write_file
from basin_lens.model import (
    HookedModel,
    check_model,
    copy_of,
    device_of,
    fingerprint,
    forward_pass,
    full_name,
    load_model,
    measuring,
    n_context,
    parameters_of,
    put_tuned,
    remember_name,
    save_tuned,
    tuned_facts,
)
from basin_lens.texts import Passage, Texts, read_passages, tokenize
from basin_lens.values import Facts, Whole, hides_bars, whole, whole_fields, whole_numbers

_CHECKPOINT = "checkpoint.safetensors"
_KIND = records.Kind("a checkpoint", "basin_lens tuning 1", "Delete it to begin anew.")
# A backward pass costs two forward ones, and AdamW on 135 M parameters about as much as a quarter of a step of 512 tokens.
_FORWARDS_PER_STEP = 3.5


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, the learning rate rising linearly over `warmup` steps and falling as a half cosine to a tenth.

    Args:
        learning_rate: the highest, per step.
        batch_size: sequences per step.
        filler: how many of them are filler text, if there is any.
        warmup: steps until the highest learning rate.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        seed: of the order of the texts; nothing else is random (no dropout).

    Example:
        >>> import basin_lens as bl
        >>> round(bl.memorize.Recipe(warmup=9).rate(0, 100) / 5e-5, 3)
        0.1
    """

    learning_rate: float = 5e-5
    batch_size: Whole = 8
    filler: Whole = 2
    warmup: Whole = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: Whole = 0

    def __post_init__(self) -> None:
        whole_fields(self, StudyError)
        if not (self.learning_rate > 0 and self.clip > 0 and 0 <= self.filler < self.batch_size and self.warmup >= 0):
            raise StudyError(
                f"expected a learning rate and a clip above 0 and fewer filler texts than the batch holds, got {self}. Change the "
                "recipe."
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of so many."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Tuned:
    """A trained model and how it came to be.

    `history`: one record per step with `step`, `loss` (nats per token of the texts to be memorized, before the step),
    `filler_loss`, `learning_rate`. `facts`: plain JSON: recipe, steps, how often each text was shown, hash of the texts, the base
    model.
    """

    model: HookedModel
    base: HookedModel
    history: tuple[Facts, ...]
    facts: Facts

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Keep the weights (safetensors) and their provenance. `load_model(folder)` and `load_tuned` read them.

        Raises:
            StoreError: the folder cannot be written.
        """
        return save_tuned(self.model, folder, self.base, {**self.facts, "history": _plain(self.history)})


@whole_numbers(StudyError)
@torch.inference_mode(False)  # the caller's would make tensors that no gradient can pass
def finetune(
    model: HookedModel,
    data: Texts,
    doses: int | Sequence[int],
    *,
    filler: Texts | None = None,
    recipe: Recipe | None = None,
    max_length: int = 128,
    name: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    every: int = 25,
    progress: bool = True,
) -> Tuned:
    """Train a copy of a model on texts, each shown as often as its dose says, mixed with filler text.

    The shows of a text are spread evenly over the training, with a random shift. The loss is the mean over the batch's tokens of
    -log p(token | those before it). Attention is eager and dropout is off, so that the result follows from the seed alone (on one
    machine, with one number of threads).

    Args:
        model: a hooked model; it stays as it is (twice the memory, and three times for gradients and AdamW).
        data: texts as for `analyze`; a text longer than `max_length` becomes several sequences of one dose.
        doses: how often each text is shown: one number, or one for each text.
        filler: other texts, taken in turn; None: none.
        recipe: how to train.
        max_length: tokens per sequence, BOS counted.
        name: full name of the trained model in provenance; None: from the base and a hash.
        folder: where to keep the trained model and, on the way, its last good state. An interrupted training goes on from there, a
            finished one is taken from there, with the same result. None: nothing is kept.
        every: steps between checkpoints.
        progress: show a bar.

    Returns:
        a `Tuned`.

    Raises:
        TextError: texts without tokens. StudyError: doses that do not fit; the loss is not finite (the last good checkpoint stays).
        StoreError: the folder holds another training, cannot be written, or is being written to by somebody else.

    Source: Carlini et al. 2019, "The secret sharer" (canaries); Loshchilov and Hutter 2019 (AdamW, by torch).

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> tuned = bl.memorize.finetune(model, ["The lamp hums in the north wind."], 2, max_length=16, progress=False)
        >>> len(tuned.history)
        1
    """
    if every < 1:
        raise StudyError(f"expected checkpoints every 1 or more steps, got {every}.")
    check_model(model)
    recipe = recipe or Recipe()
    plan = _planned(model, read_passages(data), doses, None if filler is None else read_passages(filler), recipe, max_length)
    if folder is None:
        return _trained(model, plan, recipe, name, None, every, progress)
    clear_leavings(folder)
    if _is_whole(folder):
        return _finished(model, Path(folder), plan.facts)
    with lock_folder(folder):
        if _is_whole(folder):  # by somebody else, until a moment ago
            return _finished(model, Path(folder), plan.facts)
        made = _trained(model, plan, recipe, name, Path(folder), every, progress)
        made.save(folder)
        (Path(folder) / _CHECKPOINT).unlink(missing_ok=True)
        return made


@dataclass(frozen=True)
class _Plan:
    """What a training goes through: token ids of all sequences, those to be memorized first, and which of them each step sees.

    `facts`: plain JSON, by whose hash, `training`, the same training is known again.
    """

    sequences: list[tuple[int, ...]]
    own: int  # of the sequences: to be memorized
    texts: int
    batches: list[tuple[int, ...]]
    facts: Facts


def _planned(
    model: HookedModel,
    passages: list[Passage],
    doses: int | Sequence[int],
    filler: list[Passage] | None,
    recipe: Recipe,
    max_length: int,
) -> _Plan:
    shown = [doses] * len(passages) if isinstance(doses, int) else [whole(dose, "doses", error=StudyError) for dose in doses]
    if len(shown) != len(passages) or min(shown) < 1:
        raise StudyError(f"expected a dose of at least 1 for each of {len(passages)} texts, got {shown[:8]}.")
    own = tokenize(model, passages, max_length=max_length)
    others = [] if filler is None else tokenize(model, filler, max_length=max_length)
    sequences = [s.tokens for s in [*own, *others]]
    batches = schedule([shown[s.passage] for s in own], len(others), recipe)
    facts: Facts = {
        "recipe": asdict(recipe),
        "base": fingerprint(model),
        "max_length": max_length,
        "steps": len(batches),
        "texts": hashlib.blake2b(json.dumps([sequences, shown]).encode(), digest_size=16).hexdigest(),
        "texts_shown": sum(shown[s.passage] for s in own),
        "doses": shown,
        "filler_sequences": len(others),
    }
    facts["training"] = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    return _Plan(sequences, len(own), len(passages), batches, facts)


def _is_whole(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / "tuned.json").is_file()


def _trained(
    model: HookedModel, plan: _Plan, recipe: Recipe, name: str | None, folder: Path | None, every: int, progress: bool
) -> Tuned:
    """A copy of the model after the last step; of the folder's checkpoint, if it holds one."""
    key, steps = plan.facts["training"], len(plan.batches)
    copy = copy_of(model)
    remember_name(copy, name or f"{full_name(model)}, tuned on {plan.texts} texts ({key})")
    run = _Run(copy, recipe, steps, key)
    if folder is not None:
        run.resume(folder)
    with tqdm(total=steps, initial=run.step, desc="training", unit="step", disable=hides_bars(progress)) as bar:
        for batch in plan.batches[run.step :]:
            run.take(*padded([plan.sequences[i] for i in batch]), np.array(batch) < plan.own, folder, every)
            bar.set_postfix_str(f"loss {run.history[-1]['loss']:.2f}")
            bar.update()
    return Tuned(copy.eval(), model, tuple(run.history), plan.facts)


def _finished(model: HookedModel, folder: Path, plan: Facts) -> Tuned:
    """The model that this very training left in its folder.

    Raises:
        StoreError: it is of another training.
    """
    facts = dict(tuned_facts(folder)["facts"])
    history = facts.pop("history", [])
    if facts.get("training") != plan["training"]:
        raise StoreError(
            f"expected a model of this training ({plan['training']}), got {str(folder)!r} of another ({facts.get('training')}): "
            "other texts, doses, recipe or base model. Choose another folder, or delete it."
        )
    with _KIND.reading(folder):
        told = tuple(_numbers(history))
    (folder / _CHECKPOINT).unlink(missing_ok=True)  # left by a death after the model was whole
    return Tuned(put_tuned(model, folder), model, told, plan)


def _plain(history: Sequence[Facts]) -> list[Facts]:
    """NaN of a step without filler is no JSON."""
    return [{k: None if v != v else v for k, v in record.items()} for record in history]


def _numbers(history: Sequence[Facts]) -> list[Facts]:
    return [{k: math.nan if v is None else v for k, v in record.items()} for record in history]


def load_tuned(folder: str | os.PathLike[str], base: HookedModel | None = None) -> HookedModel:
    """The model of `Tuned.save`, to be analyzed as any other.

    Args:
        folder: where it was saved.
        base: the model that it was trained from; None: loaded as it was then, if it came from `load_model`.

    Raises:
        ModelError: no such model, another base, or a base that only the user has.
    """
    return load_model(folder, kind=tuned_facts(folder)["kind"]) if base is None else put_tuned(base, folder)


def schedule(doses: Sequence[int], n_filler: int, recipe: Recipe) -> list[tuple[int, ...]]:
    """Which sequences each step sees: those to be memorized are 0 .. n - 1, filler follows. Every dose is met exactly."""
    rng = np.random.default_rng(recipe.seed)
    places = [((show + rng.random()) / dose, index) for index, dose in enumerate(doses) for show in range(dose)]
    order = [index for _, index in sorted(places)]
    free = recipe.batch_size - (recipe.filler if n_filler else 0)
    turn: list[int] = []
    batches = []
    for first in range(0, len(order), free):
        while n_filler and len(turn) < recipe.filler:
            turn += (rng.permutation(n_filler) + len(doses)).tolist()
        own, turn = turn[: recipe.filler], turn[recipe.filler :]
        batches.append((*order[first : first + free], *own))
    return batches


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Sequences padded on the right with id 0, and which tokens are real."""
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64, device="cpu")
    valid = torch.zeros(len(sequences), longest, dtype=torch.bool, device="cpu")
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence, device="cpu")
        valid[row, : len(sequence)] = True
    return tokens, valid


@whole_numbers(StudyError)
def estimate(model: HookedModel, n_tokens: int) -> float:
    """Seconds that training on so many tokens will take, from a timed forward pass (about a second)."""
    tokens = torch.zeros(4, min(64, n_context(model)), dtype=torch.int64, device=device_of(model))
    with measuring(model):
        forward_pass(model, tokens[:1], {})  # the first pass of a process is slow
        begun = time.perf_counter()
        forward_pass(model, tokens, {})
    return _FORWARDS_PER_STEP * n_tokens * (time.perf_counter() - begun) / tokens.numel()


class _Run:
    """Weights, optimizer and history between two steps."""

    def __init__(self, model: HookedModel, recipe: Recipe, steps: int, key: str) -> None:
        self.model, self.recipe, self.steps, self.key = model, recipe, steps, key
        self.parameters = parameters_of(model)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.step = 0
        self.history: list[Facts] = []

    def take(
        self, tokens: Tensor, valid: Tensor, own: Bool[np.ndarray, " batch"], checkpoint: str | os.PathLike[str] | None, every: int
    ) -> None:
        """One step; before it, a checkpoint if one is due: only weights whose loss was seen to be finite are kept."""
        device = device_of(self.model)
        tokens, valid = tokens.to(device), valid.to(device)
        with measuring(self.model, gradients=True):
            losses: Float[Tensor, "batch predicted"] = token_losses(forward_pass(self.model, tokens, {}), tokens)
            counted = valid[:, 1:]
            total = losses[counted].mean()
            mine = torch.tensor(own, device=device)[:, None] & counted
            rest = counted & ~mine
            record = {
                "step": self.step,
                "loss": float(losses.detach()[mine].mean()),
                "filler_loss": float(losses.detach()[rest].mean()) if bool(rest.any()) else float("nan"),
                "learning_rate": self.recipe.rate(self.step, self.steps),
            }
            if not math.isfinite(float(total.detach())):
                raise self._diverged("loss", float(total.detach()), checkpoint)
            if checkpoint is not None and self.step % every == 0 and self.step:
                self._keep(Path(checkpoint))
            total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip))
        if not math.isfinite(norm):
            raise self._diverged("gradient", norm, checkpoint)
        for group in self.optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.append(record)
        self.step += 1

    def _diverged(self, what: str, value: float, checkpoint: str | os.PathLike[str] | None) -> StudyError:
        kept = ""
        if checkpoint is not None:
            path = Path(checkpoint) / _CHECKPOINT
            kept = f" The last good checkpoint is kept: {path}." if path.is_file() else " There was no checkpoint before it."
        return StudyError(
            f"expected a finite {what} at step {self.step} of {self.steps}, got {value}: the training diverged and was "
            f"stopped.{kept} Lower the learning rate ({self.recipe.learning_rate:g})."
        )

    def _keep(self, folder: Path) -> None:
        """The state before this step, in one file that replaces the last one when it is whole."""
        held: dict[str, Tensor] = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            held[f"weight.{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                held[f"{key}.{index}"] = value.detach().cpu().contiguous()
        # Safetensors keeps strings beside the tensors.
        facts = {"training": self.key, "step": str(self.step), "history": json.dumps(_plain(self.history))}
        try:
            write_file(folder / _CHECKPOINT, lambda path: _KIND.write_tensors(path, held, facts))
        except SafetensorError as error:
            raise StoreError(
                f"expected a folder that can be written for checkpoints, got {str(folder)!r}: {error}. Choose another."
            ) from error

    def resume(self, folder: Path) -> None:
        """Go on from the folder's checkpoint, if it holds one.

        Raises:
            StoreError: a checkpoint of another training, or a damaged one.
        """
        path = folder / _CHECKPOINT
        if not path.exists():
            return
        with _KIND.tensors(path) as (held, facts):
            if facts.get("training") != self.key:
                raise StoreError(
                    f"expected a checkpoint of this training ({self.key}), got {str(path)!r} of another ({facts.get('training')}): "
                    "other texts, doses, recipe or base model. Choose another folder, or delete it."
                )
            step, history = int(facts["step"]), _numbers(json.loads(facts["history"]))
            if [record["step"] for record in history] != list(range(step)):
                raise ValueError(f"a history of {len(history)} steps at step {step}")
            names = set(held.keys())
            with torch.no_grad():
                for index, (name, parameter) in enumerate(self.parameters.items()):
                    parameter.copy_(held.get_tensor(f"weight.{name}"))
                    parts = {
                        key: held.get_tensor(f"{key}.{index}")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                        if f"{key}.{index}" in names
                    }
                    # AdamW's own counter stays on the CPU unless it is fused.
                    self.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in parts.items()}
        self.step, self.history = step, history
