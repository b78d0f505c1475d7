"""False positives and power over the battery. BASIN_LENS_DRAWS=400 runs every cell with so many draws (hours); without it, what fits into CI."""

import os

import pytest

from tests.simulation import battery, power

pytestmark = pytest.mark.simulation
DRAWS = int(os.environ.get("BASIN_LENS_DRAWS", "0"))


def test_a_battery_that_finds_nothing_wrong_would_find_it():
    """The limit is what it says, and a test over tokens, or one that says NaN without a reason, does not pass."""
    assert battery.limit(400) == pytest.approx(0.0827, abs=1e-4)
    cell = next(battery.cells())
    assert battery.verdict(cell, battery.Count(tested=400, found=33)) == "ok"
    assert battery.verdict(cell, battery.Count(tested=400, found=34)) == "FAILS: too many"
    assert battery.verdict(cell, battery.Count(tested=399, silent=1)).startswith("FAILS")


def test_false_positives_of_the_cells_that_mattered():
    wrong = _wrong(battery.battery(draws=max(400, DRAWS), keep=battery.named))
    assert not wrong, wrong


def test_false_positives_everywhere():
    """Every statistic on every shape of data; of distributions and levels a sixth, unless more draws are asked for."""
    wrong = _wrong(battery.battery(draws=DRAWS or 40, keep=(lambda _: True) if DRAWS else battery.rotated))
    assert not wrong, wrong


def test_power_beside_a_joint_regression():
    table = power.powers(max(200, DRAWS))
    assert table["reference"].between(0.5, 0.95).all(), table.to_string()
    assert not table["verdict"].str.startswith("FAILS").any(), table.to_string()


def _wrong(table):
    print("\n" + battery.written(table))
    wrong = table[table["verdict"].str.startswith("FAILS")]
    return wrong.to_string() if len(wrong) else ""
