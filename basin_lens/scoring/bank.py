"""Where neighbors come from."""

from basin_lens.capture import Bank, Capture, check_cache, planned_reference, reference_capture
from basin_lens.errors import NeighborError
from basin_lens.model import HookedModel, uses_bos
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.token_rows import texts_hash


def choose_bank(model: HookedModel, capture: Capture, bank: Bank, plan: Plan, *, progress: bool) -> Capture:
    """The bank that a request names, checked; the capture itself for None.

    Raises:
        NeighborError: no bank, or one without the plan's layers. CaptureError: of another model. TransportError: of a cache that is
            not the model's.
    """
    if bank is None or bank is capture:
        return capture
    if any(a.exclude == "nothing" for a in plan.of_neighbors):
        raise NeighborError(
            "expected the texts as their own bank for SeedCompression, got another bank. Leave it out, or bank=None."
        )
    if isinstance(bank, str) and bank == "reference":
        return reference_capture(model, prepend_bos=_begins_with_bos(model, capture), progress=progress)
    if not isinstance(bank, Capture):
        raise NeighborError(f'expected bank=None, a Capture or "reference", got {bank!r}.')
    bank.check_model_is(model)
    if not set(plan.layers) <= set(bank.layers):
        raise NeighborError(f"expected a bank with layers {list(plan.layers)}, got one with {list(bank.layers)}. Capture them too.")
    check_cache(model, bank, plan.path)
    return bank


def is_reference(model: HookedModel, capture: Capture, texts: str) -> bool:
    """Whether the built-in passages, as a bank of these texts, are the tokens of this hash; the model reads nothing."""
    return texts_hash(planned_reference(model, prepend_bos=_begins_with_bos(model, capture))) == texts


def _begins_with_bos(model: HookedModel, capture: Capture) -> bool:
    bos = uses_bos(model, None)
    return bos is not None and {s.tokens[0] for s in capture.sequences} == {bos}
