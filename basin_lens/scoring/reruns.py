"""States put in the queries' places and run on to the logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.analyzers import RunOn
from basin_lens.capture import Capture
from basin_lens.model import HookedModel, device_of, rerun_to_logits


def rerun_points(
    model: HookedModel,
    capture: Capture,
    layer: int,
    entering: Float[Tensor, "rows d"],
    at: Int[Tensor, " q"],
    points: Float[Tensor, "q m d"],
) -> RunOn:
    """What the model makes of `points` that enter `layer` in place of the rows `at`, beside the model as it is.

    Args:
        model: that made the capture.
        capture: whose tokens are run on.
        layer: the first block.
        entering: the capture's states that enter it, on the model's device; only the rows `at` are looked at.
        at: rows of the capture.
        points: states put in the place of each.
    """
    divergence, later = (points.new_full(points.shape[:2], torch.nan) for _ in (0, 1))
    device = device_of(model)
    for index, row in enumerate(at.tolist()):
        tokens = torch.tensor(capture.sequences[int(capture.row_seq[row])].tokens, device=device)
        pos = int(capture.row_pos[row])
        logs = rerun_to_logits(model, tokens, layer, pos, torch.cat([entering[row, None], points[index]])).log_softmax(-1)
        here = logs[:, pos]
        divergence[index] = (here[0].exp() * (here[0] - here[1:])).sum(-1)
        if pos + 1 < len(tokens):
            losses = -logs[:, pos:-1].gather(2, tokens[pos + 1 :].expand(len(logs), -1)[..., None])[..., 0].mean(1)
            later[index] = losses[1:] - losses[0]
    return RunOn(divergence, later)
