"""The crossed table of places and directions: exact zeros, planted basins found where they are, and groups that may meet."""

import math

import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import Surroundings
from basin_lens.errors import NeighborError
from basin_lens.scoring.crossed_pass import unit_of_rows
from tests.scoring.crossed import BASIS, EXACT, FACTOR, KINDS, SIZE, ZEROS, D, K, Parts, World, along, rotation


@pytest.fixture(scope="module")
def world(llama):
    return World(llama)


@pytest.mark.many
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("name", ZEROS)
def test_the_interaction_is_0_for_every_token(world, name, scale):
    crossed = world.cross(ZEROS[name], scale=scale, displaced=KINDS)
    assert len(crossed.rows) > 25
    for table in crossed.tables.values():
        for read in (table, *table.halves, *table.partner_halves):
            assert read.parts().interaction.abs().max() < EXACT / min(1, 2 * scale)


def test_what_the_parts_are_of_maps_with_known_answers(world):
    """An isometry contracts nothing, scaling by a gives -2 log a at each place along all directions, a factor is the place's."""
    zero = world.cross(ZEROS["isometry"]).tables["neighbors"].parts()
    assert zero.place.abs().max() < EXACT and zero.directions.abs().max() < EXACT
    third = world.cross(ZEROS["scaling"]).tables["neighbors"].parts()
    assert third.place.numpy() == pytest.approx(-2 * math.log(3), abs=EXACT)
    assert third.directions.numpy() == pytest.approx(-2 * math.log(3), abs=EXACT)
    crossed = world.cross(ZEROS["a factor of the place"])
    factor = -2 * FACTOR(crossed.rows)[..., 0, 0]
    parts = crossed.tables["neighbors"].parts()
    assert parts.place.numpy() == pytest.approx(factor.numpy(), abs=EXACT)
    others = (factor.sum(1, keepdim=True) - factor) / (SIZE - 1)
    assert parts.directions.numpy() == pytest.approx(others.numpy(), abs=EXACT)


def test_what_only_stretches_certain_directions_is_in_directions(world):
    """The same linear map everywhere: each cloud's own contraction, and nothing of the place."""
    crossed = world.cross(ZEROS["projection"])
    expected = []
    for row in crossed.rows.flatten().tolist():
        moves = world.cloud(row)[1]
        expected.append(math.log(float(moves.square().sum() / (moves @ BASIS).square().sum())))
    got = crossed.tables["neighbors"].parts().directions.flatten()
    assert got.numpy() == pytest.approx(expected, abs=EXACT)


def planted(world, chosen, factor):
    """At one place, and only within a ball around it, displacements along its own cloud are multiplied by a factor.

    What its partners' clouds have in common with it is left alone, so that the effect is all its own."""
    (group,) = (g for g in world.cross(lambda _, x: x).rows.tolist() if chosen in g)
    center, moves = world.cloud(chosen)
    others = torch.cat([world.cloud(row)[1] for row in group if row != chosen])
    basis = torch.linalg.svd(moves - along(moves, torch.linalg.qr(others.T).Q), full_matrices=False).Vh[: K - 1].T
    radius = 1.5 * moves.norm(dim=1).max()

    def f(rows, x):
        inside = ((x - center).norm(dim=-1, keepdim=True) < radius) & (rows == chosen)[:, None, None]
        return torch.where(inside, x + (factor - 1) * along(x - center, basis), x)

    return group, f


@pytest.mark.parametrize(("factor", "sign"), [(0.2, 1), (3.0, -1)], ids=["basin", "saddle"])
def test_a_planted_basin_is_found_where_it_is_and_a_saddle_has_the_other_sign(world, factor, sign):
    chosen = int(world.cross(lambda _, x: x).rows[5, 1])
    group, f = planted(world, chosen, factor)
    crossed = world.cross(f)
    assert group in crossed.rows.tolist()  # groups depend on what enters the block alone
    parts = crossed.tables["neighbors"].parts()
    here = crossed.rows == chosen
    found = float(parts.interaction[here])
    assert sign * found > 0.5
    assert parts.interaction[~here].abs().max() < EXACT
    assert abs(float(parts.place[here])) < EXACT  # along its partners' displacements nothing happens there
    for half in crossed.tables["neighbors"].partner_halves:
        assert float(half.parts().interaction[here]) == pytest.approx(found, abs=EXACT)
    null = world.cross(f, displaced=KINDS).tables
    assert all(null[kind].parts().interaction.abs().max() < abs(found) / 2 for kind in ("random_sets", "isotropic"))


def test_a_place_that_shrinks_everything_is_no_basin(world):
    """A ball that contracts whatever enters it is a property of the place, and is told as that."""
    chosen = int(world.cross(lambda _, x: x).rows[5, 1])
    f = lambda rows, x: torch.where((rows == chosen)[:, None, None], x / 2, x)  # noqa: E731
    crossed = world.cross(f)
    parts = crossed.tables["neighbors"].parts()
    assert parts.interaction.abs().max() < EXACT
    assert float(parts.place[crossed.rows == chosen]) == pytest.approx(2 * math.log(2), abs=EXACT)


def test_scale_is_a_factor_on_the_displacements(world):
    """A map that is linear near a place and flat beyond it contracts with scale, and not below."""
    centers = torch.zeros_like(world.states)
    for row in range(world.capture.n_rows):
        if int(world.found.near.rows[row, K - 1]) >= 0:
            centers[row] = world.cloud(row)[0]

    def saturating(rows, x):
        step = x - centers[rows][:, None]
        return centers[rows][:, None] + step / (1 + step.norm(dim=-1, keepdim=True))

    small, large = (world.cross(saturating, scale=s).tables["neighbors"].contraction.mean() for s in (1e-4, 1.0))
    assert float(small) == pytest.approx(0, abs=0.02)
    assert float(large) > 1


def test_a_constant_map_is_not_a_number(world):
    assert world.cross(lambda _, x: torch.full_like(x, 0.1)).tables["neighbors"].parts().interaction.isnan().all()


# -- groups ---------------------------------------------------------------------------------------------------------------------


def test_groups_are_of_different_documents_and_have_no_neighbor_in_common(world):
    crossed = world.cross(lambda _, x: x)
    rows = crossed.rows
    assert rows.unique().numel() == rows.numel()
    documents = unit_of_rows(world.capture, "sequence")
    for group in rows:
        assert documents[group].unique().numel() == SIZE
        assert world.found.near.rows[group].unique().numel() == SIZE * K
    able = int((world.found.near.rows[:, K - 1] >= 0).sum())
    assert crossed.without == able - rows.numel() < 0.05 * able
    facts = crossed.facts()
    assert facts["groups"] == len(rows) and facts["without_group"] == crossed.without
    before = crossed.tables["neighbors"].log_before
    assert facts["spread_within_groups"] == pytest.approx(float((before.amax(1) - before.amin(1)).median()))


def test_a_label_is_the_unit_where_it_is_excluded(llama):
    passages = [
        bl.Passage(f"{word} and so on and on it goes", labels={"kind": kind}) for word, kind in zip("abcd", "xxyy", strict=True)
    ]
    capture = bl.Capture.from_texts(llama, passages, progress=False)
    assert unit_of_rows(capture, "kind").unique().numel() == 2
    assert unit_of_rows(capture, "sequence").unique().numel() == unit_of_rows(capture, "self").unique().numel() == 4
    part = [bl.Passage(passages[0].text), *passages[1:]]
    capture = bl.Capture.from_texts(llama, part, progress=False)
    assert unit_of_rows(capture, "kind").unique().numel() == 3  # without a label, a text's document is its unit


def test_copies_of_a_text_are_one_unit_under_whatever_documents(llama):
    """One prompt four times has no partners of other texts; a document's other texts go with the copied one."""
    texts = [("one and the same", "a"), ("one and the same", "b"), ("another of b", "b"), ("a third", "c")]
    passages = [bl.Passage(text, doc=doc) for text, doc in texts]
    units = unit_of_rows(bl.Capture.from_texts(llama, passages, progress=False), "sequence")
    assert units.unique().numel() == 2
    four = [bl.Passage(texts[0][0], doc=doc) for doc in "abcd"]
    with pytest.raises(NeighborError, match="got 1"):
        bl.analyze(llama, four, [Parts(k=K, exclude="self")], progress=False)


def test_massive_dimensions_are_left_out(llama):
    """They pass, but no variance is taken of them: what the block does to them alone is nothing."""
    world = World(llama, massive=(3, 9))
    assert (~world.bank.ordinary).nonzero().flatten().tolist() == [3, 9]
    blown = torch.ones(D)
    blown[[3, 9]] = 50
    parts = world.cross(lambda _, x: x * blown, displaced=KINDS).tables
    for table in parts.values():
        assert table.contraction.abs().max() < 1e-3
    # Behind the map, too.
    behind = torch.ones(D)
    behind[5] = 50
    world.bank = Surroundings(world.bank.before, world.bank.after * behind)
    assert (~world.bank.ordinary).nonzero().flatten().tolist() == [3, 5, 9]
    assert world.cross(lambda _, x: x * behind).tables["neighbors"].contraction.abs().max() < 1e-3


def test_rotating_and_moving_all_states_changes_nothing(llama):
    """Before the map and behind it, each in its own way."""
    plain = World(llama)
    moved = World(llama, states=plain.states @ rotation(8) + 5)
    bend = lambda x: torch.tanh(x / 4) * 4  # noqa: E731
    first = plain.cross(lambda _, x: bend(x))
    second = moved.cross(lambda _, x: bend((x - 5) @ rotation(8).T) @ rotation(9) - 3)
    assert bool(plain.bank.ordinary.all()) and bool(moved.bank.ordinary.all())
    assert second.rows.tolist() == first.rows.tolist()
    for got, wanted in zip(second.tables["neighbors"].parts(), first.tables["neighbors"].parts(), strict=True):
        assert got.numpy() == pytest.approx(wanted.numpy(), abs=2e-4)
    assert first.tables["neighbors"].parts().interaction.std() > 0.01
