"""Who the neighbors of one token are."""

import pandas as pd
import torch

from basin_lens.analyzers import Contraction
from basin_lens.capture import Bank, Capture, check_cache, check_layers
from basin_lens.errors import CaptureError, NeighborError
from basin_lens.model import HookedModel, full_precision, measuring, n_layers
from basin_lens.neighbors import Metric, SameToken
from basin_lens.scoring.bank import choose_bank
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.results import LayerNeighbors
from basin_lens.scoring.run import Run
from basin_lens.transport import Context
from basin_lens.values import whole_numbers


@whole_numbers(CaptureError)
@full_precision()
def neighborhood(
    model: HookedModel,
    capture: Capture,
    layer: int,
    seq: int,
    pos: int,
    *,
    k: int = 15,
    context: Context = "patched",
    metric: Metric = "l2",
    exclude: str = "sequence",
    same_token: SameToken = "any",
    position_0: bool = False,
    bank: Bank = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Who the neighbors of one token are, and where the block takes them.

    Args:
        model: the model that made the capture.
        capture: holds the token.
        layer: block index.
        seq, pos: the token: sequence and position in it.
        k, context, metric, exclude, same_token, position_0: as for `Contraction`.
        bank: as for `analyze`.
        progress: show a bar if the reference bank must be read first.

    Returns:
        one row per neighbor, nearest first: `rank, token, text` (the text around it, the token in brackets), `passage, doc, seq,
        pos, distance_before, distance_after` (to the query and to its `resid_post`, state units; before: 1 - cosine with that
        metric).

    Raises:
        CaptureError: no such token or layer. NeighborError: position 0, or fewer than k neighbors.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> capture = bl.Capture.from_texts(model, "The cat sat on the mat.", layers=[5], progress=False)
        >>> len(bl.neighborhood(model, capture, layer=5, seq=0, pos=3, k=5, bank="reference"))
        5
    """
    capture.check_model_is(model)
    row = capture.row_of(seq, pos)
    if pos == 0:
        raise NeighborError("expected a position from 1 on, got 0: the first token is never a query.")
    analyzer = Contraction(k=k, context=context, metric=metric, exclude=exclude, same_token=same_token, position_0=position_0)
    analyzer.check()
    asked = torch.zeros(capture.n_rows, dtype=torch.bool, device="cpu")
    asked[row] = True
    (layer,) = check_layers(model, [layer])
    check_cache(model, capture, [layer])
    plan = Plan((layer,), n_layers(model), (analyzer,), seed=0)
    held = choose_bank(model, capture, bank, plan, progress=progress)
    with measuring(model):
        found = Run(model, capture, held, plan, asked, keep=analyzer).layer(layer).neighbors
    assert found is not None
    return _listed(held, found, row)


def _listed(bank: Capture, found: LayerNeighbors, row: int) -> pd.DataFrame:
    """The neighbors of one row of the capture, a line each, nearest first."""
    strings = bank.row_strings()
    lines = []
    for rank, other in enumerate(found.rows[row].tolist()):
        where = int(bank.row_seq[other])
        first, length, place = int(bank.offsets[where]), int(bank.lengths[where]), int(bank.row_pos[other])
        before = strings[first + max(1, place - 6) : first + place]
        after = strings[first + place + 1 : first + min(length, place + 5)]
        line = {
            "rank": rank + 1,
            "token": strings[other],
            "text": f"{''.join(before)}[{strings[other]}]{''.join(after)}",
            "passage": bank.sequences[where].passage,
            "doc": bank.docs[where],
            "seq": where,
            "pos": place,
            "distance_before": float(found.before[row, rank]),
            "distance_after": float(found.after[row, rank]),
        }
        lines.append(line)
    return pd.DataFrame(lines)
