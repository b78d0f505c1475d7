"""Captures made from a capture: other states on its rows, other tokens in its sequences, or some of its sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from basin_lens.capture.reading import read_states
from basin_lens.capture.record import Capture
from basin_lens.errors import CaptureError
from basin_lens.model import HookedModel, provenance
from basin_lens.texts import TokenSequence
from basin_lens.values import Facts


def borders(capture: Capture) -> list[int]:
    """Block borders whose states the capture holds, ascending: border b is the state that enters block b."""
    return sorted({border for layer in capture.layers for border in (layer, layer + 1)})


def border_states(capture: Capture, border: int) -> Float[Tensor, "rows d"]:
    """States at a border of the capture, in row order."""
    return capture.resid_pre(border) if border in capture.layers else capture.resid_post(border - 1)


def with_states(capture: Capture, states: Mapping[int, Float[Tensor, "rows d"]], control: Mapping[str, object]) -> Capture:
    """The same rows with states that are not the model's own, held in memory; what was measured on the old ones is left behind.

    `settings["controls"]` lists what was done, and `settings["states_of_model"]` is False.
    """
    settings = _recorded(capture, control) | {"states_of_model": False}
    return replace(_unread(capture), settings=settings, _states=dict(states))


def with_tokens(
    model: HookedModel, capture: Capture, tokens: Sequence[Sequence[int]], control: Mapping[str, object], *, progress: bool = True
) -> Capture:
    """The same layers, documents and labels with other tokens in each sequence, read by the model.

    There is no text any more: no passages, and character offsets are -1.

    Raises:
        CaptureError: another model than the capture's.
    """
    capture.check_model_is(model)
    sequences = [
        TokenSequence(tuple(new), old.passage, (-1,) * len(new), (-1,) * len(new))
        for new, old in zip(tokens, capture.sequences, strict=True)
    ]
    settings = _recorded(capture, control) | {"source": "tokens"}
    planned = replace(_unread(capture), sequences=sequences, passages=None, model=provenance(model), settings=settings)
    return read_states(model, planned, progress=progress)


def subset(capture: Capture, sequences: Sequence[int]) -> Capture:
    """Some sequences of a capture, in the order given, as a capture of their own in memory: states, readings and columns kept.

    Args:
        capture: in memory or on disk; or planned and not read yet, then so is the answer.
        sequences: their indices, each at most once.

    Raises:
        CaptureError: none, one that is not there, or one twice.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.capture import subset
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, ["The cat sat.", "The dog ran."], layers=[0], progress=False)
        >>> subset(capture, [1]).docs
        ['text-1']
    """
    chosen = [int(seq) for seq in sequences]
    count = len(capture.sequences)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= seq < count for seq in chosen):
        raise CaptureError(f"expected different sequences between 0 and {count - 1}, at least one, got {chosen[:8]}.")
    rows = torch.cat([torch.arange(int(capture.lengths[seq]), device="cpu") + capture.offsets[seq] for seq in chosen])
    return replace(
        _unread(capture),
        sequences=[capture.sequences[seq] for seq in chosen],
        docs=[capture.docs[seq] for seq in chosen],
        labels=[dict(capture.labels[seq]) for seq in chosen],
        columns={key: {name: value[:, rows] for name, value in held.items()} for key, held in capture.columns.items()},
        _states={border: border_states(capture, border)[rows] for border in borders(capture)} if capture.is_read else {},
        _readings={name: value[chosen] for name, value in capture._readings.items()},
        _checked=set(capture._checked),
    )


def _unread(capture: Capture) -> Capture:
    """Copies of what a capture says of its rows; no states and no values."""
    return Capture(
        sequences=list(capture.sequences),
        passages=capture.passages,
        docs=list(capture.docs),
        labels=[dict(label) for label in capture.labels],
        strings=dict(capture.strings),
        layers=capture.layers,
        model=dict(capture.model),
        settings=dict(capture.settings),
    )


def _recorded(capture: Capture, control: Mapping[str, object]) -> Facts:
    return {**capture.settings, "controls": [*capture.settings.get("controls", []), dict(control)]}
