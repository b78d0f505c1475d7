"""A finding that holds at one layer where another says the opposite is flagged, in every study."""

from dataclasses import dataclass

import pandas as pd
import pytest

from basin_lens.studies.framework.declared_tests import ONE_SIDED
from basin_lens.studies.framework.sign_flags import SIGN, signs_over_layers
from basin_lens.studies.framework.spec import DeclaredTest


@dataclass(frozen=True)
class Twelve:
    n_units: int = 12
    unit: str = "document"
    seed: int = 0


TABLE = pd.DataFrame({"layer": [0, 1, 2, 3], "score": 0.0})


def flagged(estimates, p, *, null=0.0, name="sign-flip permutation", holds=True, over_layers=False):
    """The flag of a test that gives these estimates and p at layers 1 to 3."""

    def test(part):
        assert part["layer"].min() == 1, "layer 0 is the token alone"
        return pd.DataFrame({"layer": [1, 2, 3], "estimate": estimates, "null": null, "p": p, "p_corrected": p, "test": name})

    findings = pd.DataFrame([{"question": "difference", "holds": holds}])
    found = signs_over_layers([DeclaredTest("it differs", "difference", test, over_layers)], findings, TABLE, Twelve())
    assert found["flag"].isin([SIGN]).all() and found["question"].isin(["difference"]).all()
    return found


@pytest.mark.parametrize(
    ("estimates", "p", "raised", "why"),
    [
        ([0.3, -0.2, 0.1], [0.001, 0.001, 0.5], True, "above its null at layers 1, below at 2"),
        ([0.3, -0.2, 0.1], [0.001, 0.04, 0.5], False, "above its null at layers 1, below at none"),  # 0.06 of three layers
        ([0.3, 0.2, 0.1], [0.001, 0.001, 0.001], False, "above its null at layers 1, 2, 3, below at none"),
        ([0.3, -0.2, 0.1], [0.001, float("nan"), 0.5], False, "below at none"),
    ],
)
def test_layers_on_both_sides_of_the_null(estimates, p, raised, why):
    (row,) = flagged(estimates, p).to_dict("records")
    assert row["raised"] == raised and why in row["why"]


def test_sides_are_those_of_the_null():
    assert flagged([0.7, 0.3, 0.5], [0.001] * 3, null=0.5)["raised"].all()
    assert not flagged([0.7, 0.3, 0.5], [0.001] * 3, null=0.1)["raised"].any()


def test_a_test_of_one_direction_can_be_sure_of_the_other():
    """Its p is near 1 there."""
    name = f"sign-flip permutation{ONE_SIDED}"
    assert flagged([0.3, -0.2, 0.1], [0.001, 0.999, 0.3], name=name)["raised"].all()
    assert not flagged([0.3, -0.2, 0.1], [0.001, 0.9, 0.3], name=name)["raised"].any()


def test_only_findings_that_hold_at_a_layer_of_their_choice_are_looked_at():
    assert flagged([0.3, -0.2, 0.1], [0.001] * 3, holds=False).empty
    assert flagged([0.3, -0.2, 0.1], [0.001] * 3, over_layers=True).empty
