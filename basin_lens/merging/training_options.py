"""How a merger is trained."""

import math
from dataclasses import dataclass, field

from basin_lens.errors import MergeError
from basin_lens.values import Whole, whole_fields


@dataclass(frozen=True)
class Training:
    """How to train a merger: AdamW; thresholds have their own learning rate, both fall as a half cosine to a tenth.

    Every field says what it is; nothing but the order of the windows is random.
    """

    steps: Whole = field(default=60, metadata={"help": "Optimizer steps."})
    batch_size: Whole = field(default=4, metadata={"help": "Windows per pass."})
    accumulate: Whole = field(default=1, metadata={"help": "Passes per step."})
    threshold_rate: float = field(
        default=0.05, metadata={"help": "Learning rate of thresholds and what moves them (on their logits)."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of projection and residual."})
    base_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the base model, if it is trained."})
    rate_weight: float = field(
        default=50.0, metadata={"help": "Weight of the squared shortfall of the merge rate below its target (one-sided)."}
    )
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    evaluate_every: Whole = field(default=20, metadata={"help": "Steps between evaluations on held-out windows; 0: none."})
    checkpoint_every: Whole = field(default=20, metadata={"help": "Steps between checkpoints, if a folder is given."})
    train_base: bool = field(default=False, metadata={"help": "Train a copy of the base model, too; its drift is reported."})
    seed: Whole = field(default=0, metadata={"help": "Of the order of the windows."})

    def __post_init__(self) -> None:
        whole_fields(self, MergeError)
        good = min(self.steps, self.batch_size, self.accumulate, self.checkpoint_every) >= 1 and self.evaluate_every >= 0
        if not (good and min(self.threshold_rate, self.learning_rate, self.base_rate, self.rate_weight, self.clip) > 0):
            raise MergeError(f"expected counts of 1 or more and rates above 0, got {self}. Change the training.")

    def factor(self, step: int) -> float:
        """Share of the learning rates at a step."""
        return 0.1 + 0.9 * (1 + math.cos(math.pi * step / self.steps)) / 2
