"""How far a token's neighbors are its own place in other texts of one template: they say what the template is, not the token."""

import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.capture import Capture

SHARE = 0.5  # of the tokens before two tokens that are the same, counted back from them: from there on one skeleton
# Of the neighbors that stand on the skeleton of their query: from there on a run says so. Measured: treebank and Brown at
# most 0.0007, Python files 0.02, 12 prompts of one template 0.43 to 0.58, 24 to 48 of them 0.7 to 0.83.
WARN = 0.25
_FEWEST = 3  # tokens before it, without which there is no skeleton to speak of
_QUERIES = 1000  # looked at in each search, evenly spread


def overlap(capture: Capture, bank: Capture, at: Int[Tensor, " q"], rows: Int[Tensor, "q k"]) -> tuple[float, float]:
    """Share of neighbors at the position of their query, and share of those on the skeleton of its text, both from 0 to 1.

    A neighbor is on the skeleton of its query's text if at least half of the tokens before it are the same as those before the
    query, place by place counted back from both. A causal model has seen nothing else.

    Args:
        capture, bank: where queries and neighbors are.
        at: rows of the capture.
        rows: rows of the bank, the neighbors of each; -1: none.

    Returns:
        NaN, NaN without neighbors.
    """
    some = torch.linspace(0, len(at) - 1, min(len(at), _QUERIES)).long() if len(at) else torch.empty(0, dtype=torch.long)
    query = at.cpu()[some][:, None].expand(len(some), rows.shape[1]).flatten()
    other = rows.cpu()[some].flatten()
    query, other = query[other >= 0], other[other >= 0]
    if not len(other):
        return float("nan"), float("nan")
    here, there = capture.row_pos[query], bank.row_pos[other]
    equal = torch.zeros(len(query))
    for back in range(1, int(torch.minimum(here, there).max()) + 1):
        both = (here >= back) & (there >= back)
        equal += both & (capture.row_token[(query - back).clamp_min(0)] == bank.row_token[(other - back).clamp_min(0)])
    before = torch.maximum(here, there)
    skeleton = (torch.minimum(here, there) >= _FEWEST) & (equal >= SHARE * before)
    return float((here == there).double().mean()), float(skeleton.double().mean())


def warning(shares: dict[str, float]) -> str | None:
    """What to say of a run whose neighbors often stand on the skeleton of their query, by layer; None: nothing."""
    layer, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if not share > WARN:
        return None
    return (
        f"{share:.0%} of neighbors (layer {layer}) stand on the skeleton of their query's text: at least half of the tokens before "
        "them are the same, place by place. A difference between places of one template can then be one of the bank. Compare "
        'bank="reference", or exclude the template (exclude="template", a label of the texts, with several templates).'
    )
