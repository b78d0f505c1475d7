"""The fields of a capture: token rows, the states at block borders, and the values of token analyzers."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture.disk_states import StatesOnDisk
from basin_lens.capture.layout import TokenRows
from basin_lens.capture.store import read_border
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, fingerprint, full_name
from basin_lens.values import Facts, whole_numbers


@dataclass(repr=False)
class CapturedStates(TokenRows):
    """Token rows with the residual states of some layers under one model. `Capture` makes them, saves and loads them.

    States lie in memory, or in a folder and are read from there each time; before the model has read the rows there are none.
    """

    layers: tuple[int, ...]
    model: Facts
    settings: Facts
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _states: dict[int, Tensor] | StatesOnDisk = field(default_factory=dict, repr=False)
    _readings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _store: Path | None = None
    _shards: dict[str, Facts] = field(default_factory=dict, repr=False)  # files of the store, each with its digest
    _checked: set[int] = field(default_factory=set, repr=False)

    @property
    def is_read(self) -> bool:
        """Whether the model has read the rows; a capture that is only planned holds no states yet."""
        return bool(self._states) or self._store is not None

    @property
    def states_of_model(self) -> bool:
        """Whether the states are what the model computes; False in a control that changed them."""
        return bool(self.settings.get("states_of_model", True))

    @whole_numbers(CaptureError)
    def resid_pre(self, layer: int) -> Float[Tensor, "rows d"]:
        """States entering block `layer`, float32, on the CPU, in row order."""
        return self.border(layer)

    @whole_numbers(CaptureError)
    def resid_post(self, layer: int) -> Float[Tensor, "rows d"]:
        """States leaving block `layer`, float32, on the CPU, in row order."""
        return self.border(layer + 1)

    def border(self, border: int) -> Float[Tensor, "rows d"]:
        """States entering block `border` (leaving the one before it).

        Raises:
            CaptureError: the layers around it were not captured. StoreError: a file that is not as it was written.
        """
        if self._store is not None:
            if {border, border - 1} & set(self.layers):
                return read_border(self._store, self._shards, border, (self.n_rows, self.model["width"]))
        elif border in self._states:
            return self._states[border]
        raise CaptureError(
            f"expected a captured layer, got the state entering block {border}; this capture holds layers {list(self.layers)}. "
            "Capture again with layers=[...]."
        )

    def forget_pages(self) -> None:
        """Give back the memory of states that lie in files and were looked into."""
        if isinstance(self._states, StatesOnDisk):
            self._states.forget_pages()

    def check_model_is(self, model: HookedModel) -> None:
        """Refuse a model other than the one that made this capture.

        Raises:
            CaptureError: the fingerprints differ (other weights, settings or weight processing).
        """
        if fingerprint(model) != self.model["fingerprint"]:
            raise CaptureError(
                f"expected the model that made this capture ({self.model['name']}, {self.model['fingerprint'][:8]}), got "
                f"{full_name(model)} ({fingerprint(model)[:8]}). Weights, settings or weight processing differ: "
                "capture again with this model."
            )

    def refuse_nonfinite(self, rows: Int[Tensor, " n"], border: int, states: Float[Tensor, "n d"]) -> None:
        """Refuse states of some rows at a border that are not finite.

        Raises:
            CaptureError: NaN or infinity; the first token is named.
        """
        wrong = ~torch.isfinite(states).all(1)
        if bool(wrong.any()):
            row = int(rows[wrong][0])
            raise CaptureError(
                f"expected finite states, got NaN or infinity in {int(wrong.sum())} of {len(rows)} tokens at the border "
                f"before block {border}, first in sequence {int(self.row_seq[row])}, position {int(self.row_pos[row])}. "
                "Check the weights, or use a wider dtype."
            )
