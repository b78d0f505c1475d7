"""A finding that holds at one layer where another says the opposite is flagged, in every study."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from basin_lens import stats
from basin_lens.studies.framework.declared_tests import ONE_SIDED
from basin_lens.studies.framework.sign_flags import SIGN, signs_over_layers
from basin_lens.studies.framework.spec import DeclaredTest
from tests.simulation.battery import limit


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


@pytest.mark.slow
def test_false_alarms_are_five_percent():
    """An effect at one of nine layers, noise elsewhere: layers of the other sign are chance, in 400 draws."""
    rng, layers, documents, draws = np.random.default_rng(0), 9, 12, 400
    keys = pd.MultiIndex.from_product([range(1, layers + 1), range(documents)], names=["layer", "seq"]).to_frame(index=False)
    keys = keys.assign(doc=keys["seq"].map("doc-{}".format), pos=1)
    one = DeclaredTest("it differs", "difference", lambda part: stats.before_after(part, "score", correction="bh"))
    held, raised = pd.DataFrame([{"question": "difference", "holds": True}]), 0
    for _ in range(draws):
        table = keys.assign(score=rng.normal(size=len(keys)) + 3.0 * (keys["layer"] == 5))
        raised += bool(signs_over_layers([one], held, table, Twelve())["raised"].any())
    print(f"{raised} of {draws} draws")
    assert raised / draws <= limit(draws)
