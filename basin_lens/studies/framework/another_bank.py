"""The tokens of a run with neighbors from elsewhere: what depends on the bank is not of the tokens."""

import warnings
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.analyzers.crossed_table import PartnersFrom
from basin_lens.capture import Capture
from basin_lens.errors import BankWarning, BasinLensError
from basin_lens.model import HookedModel
from basin_lens.scoring import analyze
from basin_lens.studies.framework.contrast import contrasted, contrasted_first
from basin_lens.studies.framework.measured_texts import HEADLINE, Measured
from basin_lens.studies.framework.random_twin import compression_of, scored_tokens, taken_over

OWN_BANK = "the run's own"
_NAMES = {None: "the texts themselves", "reference": "the built-in passages"}


def under_another_bank(model: HookedModel, measured: Measured) -> tuple[pd.DataFrame | None, str, str]:
    """The run's table with the headline score of the same tokens under another bank; its name; and why there is none, or "".

    The built-in passages where the texts were their own bank or another capture was, and the texts themselves where the built-in
    passages were.
    """
    bank: Literal["reference"] | None = None if isinstance(measured.bank, str) else "reference"
    if bank is not None and measured.capture.passages is None:
        return None, "", "the built-in passages are texts, and token ids were given"
    of_spans = measured.contrast is not None and measured.contrast.by == "span"
    partners: PartnersFrom = "bank" if bank is not None and of_spans else "texts"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BankWarning)  # what it warns of is what is looked at here
            made = analyze(
                model,
                measured.capture,
                [compression_of(measured, nulls=("random_sets",), partners=partners)],
                layers=measured.layers,
                bank=bank,
                queries=_asked(measured, partners),
                seed=measured.seed,
                progress=False,
            )
    except BasinLensError as error:
        return None, "", f"{_NAMES[bank]} could not serve as one: {str(error).rstrip('.')}"
    # The errors of its random sets are its own: the table keeps those of the run, which cancel in a difference of the same run.
    return tables.with_provenance(taken_over(measured.table, made, {HEADLINE: HEADLINE}), measured.table), _NAMES[bank], ""


def _asked(measured: Measured, partners: PartnersFrom) -> Bool[np.ndarray, " rows"]:
    """Every token of the contrast, and the others that these are crossed with: whom one bank leaves out, the other may not."""
    contrast = measured.contrast
    if contrast is None:
        return scored_tokens(measured, HEADLINE)
    if partners == "bank":
        return contrasted(measured.capture, contrast)
    return contrasted_first(measured.capture, contrast, measured.settings["compression_tokens"], measured.seed)


def is_own_texts(measured: Measured) -> bool:
    """Whether the texts were their own bank."""
    return not isinstance(measured.bank, str | Capture)
