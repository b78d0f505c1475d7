"""A trained merger moved to a budget of the cache."""

import torch

from basin_lens.errors import MergeError
from basin_lens.merging.losses import share_left, surprisal_for
from basin_lens.merging.token_merger import TokenMerger
from basin_lens.merging.windows import Windows, batches
from basin_lens.model import HookedModel, device_of, forward_pass


def fit_budget(
    merger: TokenMerger, model: HookedModel, windows: Windows, share: float, *, tolerance: float = 0.01, context: int | None = None
) -> float:
    """Move all thresholds together until `share` of the cache is left on these windows; what layers differ by is kept.

    Texts that nothing is tested on. `context`: the protocol of that name, see `TokenMerger.attached`.

    Returns:
        the share that was reached.

    Raises:
        MergeError: no threshold reaches it, or the rule has none.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20, 21], threshold=0.5).calibrate(model, windows.tokens)
        >>> abs(bl.merging.fit_budget(merger, model, windows, 0.98) - 0.98) < 0.02
        True
    """
    if not merger.options.decision.learned:
        raise MergeError(f"expected thresholds to move, got rule {merger.options.rule!r}. Calibrate with target_bytes instead.")
    begun = merger.weights.raw.detach().clone()

    def reached(shift: float) -> float:
        with torch.no_grad():
            merger.weights.raw.copy_(begun + shift)
        merger.forget()
        for rows in batches(windows):
            tokens = windows.tokens[rows].to(device_of(model))
            surprisal = surprisal_for(merger, model, tokens)
            with merger.attached(model, context=context, surprisal=surprisal), torch.no_grad():
                forward_pass(model, tokens, {})
        found = share_left(merger, merger.statistics())
        merger.forget()
        return found

    # Outwards in growing steps, then by halves: budgets are seldom far.
    shift, found = 0.0, reached(0.0)
    side = 1.0 if found < share else -1.0
    near, step = 0.0, 0.5
    while abs(found - share) > tolerance and (share - found) * side > 0 and step <= 8:
        near, shift = shift, side * step
        found, step = reached(shift), 2 * step
    far = shift
    for _ in range(8):
        if abs(found - share) <= tolerance:
            return found
        shift = (near + far) / 2
        found = reached(shift)
        near, far = (shift, far) if (share - found) * side > 0 else (near, shift)
    if abs(found - share) > 0.02:
        with torch.no_grad():
            merger.weights.raw.copy_(begun)
        raise MergeError(
            f"expected thresholds that leave {share:.2f} of the cache, got {found:.2f} at best. Merge in more layers, lower the "
            "floor, or ask for more."
        )
    return found
