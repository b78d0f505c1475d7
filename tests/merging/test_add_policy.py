"""A new merging policy costs a file and a line; and what the parts of the room promise one another."""

import importlib.util
from pathlib import Path

import pytest
import torch

from basin_lens import merging
from basin_lens import model as door
from basin_lens.errors import MergeError
from basin_lens.merging import POLICIES, RULES, Setting, TokenMerger, Windows
from basin_lens.merging import policies as policies_room
from basin_lens.merging.merge_pass import Given, MergePass
from basin_lens.merging.options import Options
from basin_lens.merging.parameters import Parameters, shape_of
from basin_lens.merging.policies import Policy, Rule, all_rules, compared_policies
from tests.conftest import make_bridge, random_tokens

LENGTH = 24
FILE = '''
"""The cluster that was opened first."""

from basin_lens.merging.policies.contract import Choice, Offer, Policy, Rule


class Oldest(Rule):
    """Whatever is like the first cluster joins it."""

    name = "oldest"
    description = "the cluster that was opened first, if the similarity reaches the level"
    learned = True

    def join(self, offer: Offer) -> Choice:
        return Choice(0, bool(offer.similarity()[0] >= offer.level))


OLDEST = Policy("oldest", "only with the cluster opened first", rule=Oldest())
'''


@pytest.fixture(scope="module")
def tiny():
    return door.in_dtype(make_bridge("llama"), torch.float64)


@pytest.fixture
def oldest(tmp_path, monkeypatch):
    """The file, and the line."""
    (tmp_path / "oldest.py").write_text(FILE)
    spec = importlib.util.spec_from_file_location("oldest", tmp_path / "oldest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(POLICIES, module.OLDEST.name, module.OLDEST)


@pytest.mark.slow(everywhere=True)
@pytest.mark.usefixtures("oldest")
def test_a_policy_of_one_file_runs_streams_trains_and_is_compared(tiny):
    tokens, calibration = random_tokens(2, LENGTH), random_tokens(4, LENGTH, seed=9)
    merger = TokenMerger([0, 1, 2], rule="oldest", target_rate=0.3, recent=2, projection=6, floor=-1.0).calibrate(tiny, calibration)
    with merger.attached(tiny), torch.no_grad():
        full = door.forward_pass(tiny, tokens, {})
        for found in merger.pass_.assigned.values():
            joined = found.joined.nonzero().tolist()
            assert joined and all(found.leader[b, p] == 1 for b, p in joined)  # position 0 stays raw
    with merging.streaming(merger, tiny, 2) as stream, torch.no_grad():
        steps = torch.stack([stream.step(tokens[:, place]) for place in range(LENGTH)], 1)
    assert (steps - full).abs().max() < 1e-5
    assert merger.statistics()["bytes"].tolist() == stream.nbytes()
    windows = Windows(random_tokens(6, LENGTH, seed=3), tuple("abcdef"))
    merging.train_merger(merger, tiny, windows, training=merging.Training(steps=1, batch_size=2), progress=False)
    assert merger.weights.raw.grad is None and not merger.weights.raw.requires_grad
    setting = Setting((0, 1, 2), budgets=(0.85,), projection=6, recent=2, policies=("oldest", "stride"))
    held_out = Windows(random_tokens(8, LENGTH, seed=8), tuple("abcdefgh"))
    apart = Windows(calibration, tuple("wxyz"))
    compared = merging.compare_policies(tiny, apart, held_out, setting, progress=False).windows
    shares = compared.groupby("policy")["bytes_share"].mean()
    assert shares["oldest"] == pytest.approx(0.85, abs=0.06) and shares["stride"] == pytest.approx(shares["oldest"], abs=0.03)


def test_a_rule_that_nobody_wrote_is_refused_by_name():
    with pytest.raises(MergeError, match=r"expected rule among cosine, .*got 'oldest'"):
        TokenMerger([0], threshold=0.5, rule="oldest")


def test_every_file_of_a_policy_is_in_the_list():
    files = {path.stem for path in Path(policies_room.__file__).parent.glob("*.py")} - {"__init__", "contract"}
    assert files == {name.replace(" ", "_") for name in POLICIES}
    assert all(isinstance(policy, Policy) and policy.name == name for name, policy in POLICIES.items())
    assert set(RULES) == set(all_rules()) == {policy.rule.name for policy in POLICIES.values()} and all(RULES.values())


def test_what_needs_scores_or_a_whole_context_is_not_compared():
    assert set(POLICIES) - set(compared_policies()) == {"score", "bipartite"}
    with pytest.raises(MergeError, match=r"expected policies of trained, .*got Setting"):
        Setting((0,), policies=("bipartite",))


def test_a_rule_that_leaves_its_choice_open_cannot_be_made():
    class Undecided(Rule):
        name = "undecided"

    with pytest.raises(TypeError, match="join"):
        Undecided()
    with pytest.raises(MergeError, match="decides token by token, got 'bipartite'"):
        merging.Clusters("bipartite", 4)


@pytest.mark.parametrize("changes", [{}, {"adaptive": True, "projection": 6}, {"residual": "gated", "residual_width": 3}], ids=str)
def test_parameters_are_known_at_construction(tiny, changes):
    made = Parameters(Options(layers=(0, 2), threshold=0.4, recent=2, **changes), shape_of(tiny))
    sizes = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    merger = TokenMerger([0, 2], threshold=0.4, recent=2, **changes).calibrate(tiny, random_tokens(4, LENGTH, seed=9))
    assert {name: tuple(value.shape) for name, value in merger.weights.state_dict().items()} == sizes
    assert torch.equal(made.raw, merger.weights.raw)


def test_a_pass_changes_nothing_that_it_was_given(tiny):
    merger = TokenMerger([0, 1], target_rate=0.3, recent=2, adaptive=True, projection=6)
    merger.calibrate(tiny, random_tokens(4, LENGTH, seed=9))
    before = {name: value.clone() for name, value in merger.weights.state_dict().items()}
    tokens, kept = random_tokens(2, LENGTH), dict(vars(merger))
    made = MergePass(merger.options, merger.weights, Given(valid=torch.ones(2, LENGTH, dtype=torch.bool)))
    with torch.no_grad():
        door.forward_pass(tiny, tokens, made.readers())
    assert [row["layer"] for row in made.noted] == [0, 1] and sum(row["merged"] for row in made.noted) > 0
    assert all(torch.equal(value, before[name]) for name, value in merger.weights.state_dict().items())
    assert merger.statistics().empty and vars(merger) == kept
