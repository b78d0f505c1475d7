"""What a training does when merging suddenly costs more."""

import math
from dataclasses import dataclass


@dataclass
class Parachute:
    """Backs off when merging suddenly costs more, and relaxes when it no longer does.

    It sees the excess loss of the batch (merged less plain, the same tokens), in nats per token. Above the running mean by `spike`,
    all thresholds move a part of the way to 1; once the excess is back within a quarter of `spike`, they return in half steps.
    After each event it waits.
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
