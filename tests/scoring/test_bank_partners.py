"""Few texts and another bank: a token's partners are tokens of the bank, each in its own context."""

import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens.analyzers import Compression, Crossing, Surroundings
from basin_lens.errors import NeighborError
from basin_lens.scoring import Request
from basin_lens.scoring import score as scored
from basin_lens.scoring.clouds import Clouds
from basin_lens.scoring.crossed_pass import CrossedPass, units_of_both
from basin_lens.scoring.plan import SearchOptions
from basin_lens.scoring.search import Searches
from basin_lens.transport import BlockMap
from tests.conftest import TEXTS, make_bridge, make_hf, random_tokens
from tests.scoring.crossed import EXACT, KINDS, SIZE, ZEROS, D, K, Parts, along, parts_by_loops, plain_images
from tests.scoring.oracle import facts_of, run, variance

SEQUENCES, LENGTH = 16, 10
OWN = SEQUENCES * LENGTH  # the texts' rows are numbered after the bank's where a map has something of each row's own


class Two:
    """Planted states of two texts and of a bank, and any function in place of the block."""

    def __init__(self, llama):
        g = torch.Generator().manual_seed(0)
        tokens = random_tokens(2, LENGTH, seed=9), random_tokens(SEQUENCES, LENGTH)
        self.captures = [bl.Capture.from_texts(llama, t, progress=False) for t in tokens]
        self.states = [3 * torch.randn(c.n_rows, D, generator=g) for c in self.captures]
        self.after = [torch.randn(c.n_rows, D, generator=g) for c in self.captures]
        inner = self.captures[1].row_pos > 0
        self.bank = Surroundings(self.states[1][inner], self.after[1][inner])
        self.options, self.searched = SearchOptions.of(Parts()), []
        for capture, states in zip(self.captures, self.states, strict=True):
            asked = torch.ones(capture.n_rows, dtype=torch.bool)
            searches = Searches(llama, capture, self.captures[1], {self.options: K}, asked, "auto", 0)
            self.searched.append((searches, searches.find(self.options, 1, states, self.states[1])))

    def cross(self, f, displaced=("neighbors",), scale=1.0):
        """The tables of a map f(rows [q], points [q, m, d]); `f` sees the texts' rows from `OWN` on."""
        sides = []
        for first, states, after, (searches, found) in zip((OWN, 0), self.states, self.after, self.searched, strict=True):
            at = lambda rows, x, first=first: f(rows + first, x)  # noqa: E731
            passage = BlockMap("patched", states, after, self.states[1], self.after[1], at, at)
            crossing = Crossing(SIZE, scale, displaced)
            sides.append(Clouds(searches, 1, passage, self.bank, self.options, found, K, crossing))
        return CrossedPass(*sides)(self.searched[0][1].near.rows[:, K - 1] >= 0)


@pytest.fixture(scope="module")
def two(llama):
    return Two(llama)


@pytest.mark.many
@pytest.mark.parametrize("name", ZEROS)
def test_the_interaction_is_0_for_every_token(two, name):
    crossed = two.cross(ZEROS[name], displaced=KINDS)
    assert len(crossed.rows) == 18 and crossed.without == 0
    for table in crossed.tables.values():
        for read in (table, *table.halves, *table.partner_halves):
            assert read.parts().interaction.shape == (18, 1)
            assert read.parts().interaction.abs().max() < EXACT


@pytest.mark.parametrize(("factor", "sign"), [(0.2, 1), (3.0, -1)], ids=["basin", "saddle"])
def test_a_planted_basin_is_found_where_it_is(two, factor, sign):
    """Displacements along a token's own cloud, and not along its partners', are multiplied at its place alone."""
    crossed = two.cross(lambda _, x: x)
    row, *partners = crossed.rows[7].tolist()

    def cloud(side, at):
        near = two.states[1][two.searched[side][1].near.rows[at]]
        return near.mean(0), near - near.mean(0)

    center, moves = cloud(0, row)
    others = torch.linalg.qr(torch.cat([cloud(1, at)[1] for at in partners]).T).Q
    basis = torch.linalg.svd(moves - along(moves, others), full_matrices=False).Vh[: K - 1].T

    def f(rows, x):
        return torch.where((rows == OWN + row)[:, None, None], x + (factor - 1) * along(x - center, basis), x)

    planted = two.cross(f)
    assert planted.rows.tolist() == crossed.rows.tolist()
    found = planted.tables["neighbors"].parts().interaction[:, 0]
    assert sign * float(found[7]) > 0.5
    assert np.delete(found.numpy(), 7) == pytest.approx(0, abs=EXACT)


def test_partners_are_the_nearest_of_other_documents_with_other_neighbors(two):
    crossed = two.cross(lambda _, x: x)
    own, bank = units_of_both(*two.captures, "sequence")
    near = [found.near.rows for _, found in two.searched]  # of one bank, in which no two rows are one point
    for group in crossed.rows.tolist():
        row, *partners = group
        assert len({int(own[row]), *bank[partners].tolist()}) == SIZE
        assert len(torch.cat([near[0][row], *near[1][partners]]).unique()) == SIZE * K
    before = crossed.tables["neighbors"].log_before
    assert (before[:, 1:] - before[:, :1]).abs().max(1).values.median() < 0.1
    assert crossed.scored.flatten().tolist() == (two.captures[0].row_pos > 0).nonzero().flatten().tolist()


def test_copies_in_the_bank_are_one_neighbor(llama, monkeypatch):
    """Every text of the bank twice, under two documents: a prefix is in one cloud of a group at most."""
    tokens, texts = random_tokens(1, 12, seed=9), random_tokens(SEQUENCES, 12)
    twice = bl.Capture.from_texts(llama, torch.cat([texts, texts]), progress=False)
    kept = []

    class Watched(CrossedPass):
        def crossed(self, *given):
            kept.append((super().crossed(*given), [side.near for side in (self.own, self.partners)]))
            return kept[-1][0]

    monkeypatch.setattr("basin_lens.scoring.map_scores.CrossedPass", Watched)
    run(llama, tokens, Parts(k=K, displaced=("neighbors",)), bank=twice, layers=[1])
    ((crossed, near),) = kept
    assert len(crossed.rows) == 11
    for group in crossed.rows:
        rows = torch.cat([near[0](group[:1]), near[1](group[1:])]).flatten()
        assert len({tuple(texts[row // 12 % SEQUENCES, : row % 12 + 1].tolist()) for row in rows.tolist()}) == SIZE * K


# -- through analyze ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(llama):
    return bl.Capture.from_texts(llama, random_tokens(SEQUENCES, 12), progress=False)


def test_a_single_prompt_has_scores_and_nulls(llama, bank):
    analyzer = Compression(k=K, contractions=True)
    table = run(llama, random_tokens(1, 12, seed=9), analyzer, bank=bank)
    names = [column.name for column in analyzer.columns]
    assert table[table.pos > 0][names].notna().all().all()
    assert table[table.pos == 0][names].isna().all().all()
    assert (table.groupby("layer")["compression"].std() > 0.01).all()
    for layer in "012":
        facts = facts_of(table)["groups"][layer]["compression"]
        assert (facts["partners"], facts["groups"], facts["without_group"], facts["size"]) == ("bank", 11, 0, 4)
        assert 0 < facts["local"] < 1
        assert set(facts["reliability_over_partners"]) == set(names)
    many = run(llama, random_tokens(6, 12, seed=9), analyzer, bank=bank, layers=[1])
    assert facts_of(many)["groups"]["1"]["compression"]["partners"] == "texts"
    assert facts_of(many)["groups"]["1"]["compression"]["groups"] * 4 == many["compression"].notna().sum()


@pytest.mark.many
@pytest.mark.parametrize("context", ["attn", "mlp", "solo"])
def test_every_context_that_passes_states(llama, bank, context):
    table = run(llama, random_tokens(1, 8, seed=9), Compression(k=K, context=context, nulls=False), bank=bank, layers=[1])
    assert table[table.pos > 0]["compression"].notna().all()


def test_other_queries_change_no_score(llama, bank):
    """Nobody's partners depend on who else is asked for."""
    tokens = random_tokens(1, 12, seed=9)
    whole = run(llama, tokens, Compression(k=K, nulls=False), bank=bank, layers=[1])
    part = run(llama, tokens, Compression(k=K, nulls=False), bank=bank, layers=[1], queries=[3, 8])
    assert part["compression"].notna().sum() == 2
    assert part["compression"][[3, 8]].to_numpy() == pytest.approx(whole["compression"][[3, 8]].to_numpy(), abs=1e-5)


@pytest.mark.slow(everywhere=True)
def test_other_texts_change_no_score_with_partners_from_the_bank(llama, bank):
    """Many texts, and partners by name: alone, among others and in another order, a text has the same scores and nulls."""
    analyzer = Compression(k=K, partners="bank", contractions=True)
    names = [column.name for column in analyzer.columns]
    tokens = random_tokens(6, 12, seed=9)
    many = run(llama, tokens, analyzer, bank=bank, layers=[0, 1])
    facts = facts_of(many)["groups"]["1"]["compression"]
    assert (facts["partners"], facts["without_group"], facts["groups"]) == ("bank", 0, 6 * 11)
    assert many[many.pos > 0][names].notna().all().all()
    for some in ([3], [4, 3, 0]):
        found = run(llama, tokens[some], analyzer, bank=bank, layers=[0, 1])
        for at, text in enumerate(some):
            one, other = (t[t.seq == where][names].to_numpy() for t, where in ((found, at), (many, text)))
            assert one == pytest.approx(other, abs=1e-4, nan_ok=True)
    asked = run(llama, tokens, analyzer, bank=bank, layers=[1], queries=[3, 8])
    rows = asked["compression"].notna()
    assert asked[rows][names].to_numpy() == pytest.approx(many[many.layer == 1][rows.to_numpy()][names].to_numpy(), abs=1e-4)


def test_partners_from_the_bank_need_another_bank(llama):
    with pytest.raises(NeighborError, match=r'expected another bank.*partners="bank".*bank="reference"'):
        run(llama, random_tokens(6, 12), Compression(k=K, partners="bank"), layers=[1])
    few = bl.Capture.from_texts(llama, random_tokens(2, 40), progress=False)
    with pytest.raises(NeighborError, match="bank of at least 3"):
        run(llama, random_tokens(6, 12, seed=9), Compression(k=K, partners="bank"), bank=few, layers=[1])


def test_partners_of_texts_and_of_the_bank_stand_beside_one_another(llama, bank):
    """Two analyzers in one run share the search, and not the groups."""
    both = [Compression(k=K, nulls=False), Compression(k=K, nulls=False, partners="bank", name="banked")]
    table = run(llama, random_tokens(6, 12, seed=9), *both, bank=bank, layers=[1])
    groups = facts_of(table)["groups"]["1"]
    assert [groups[name]["partners"] for name in ("compression", "banked")] == ["texts", "bank"]
    alone = run(llama, random_tokens(6, 12, seed=9), both[1], bank=bank, layers=[1])
    assert table["banked"].to_numpy() == pytest.approx(alone["banked"].to_numpy(), abs=1e-5, nan_ok=True)


def test_a_label_that_the_bank_lacks(llama, bank):
    passages = [bl.Passage("The man took the piano away in the rain.", labels={"kind": "x"})]
    table = run(llama, passages, Compression(k=K, nulls=False, exclude="kind"), bank=bank, layers=[1])
    assert table[table.pos > 0]["compression"].notna().all()


def test_the_texts_as_their_own_bank_are_refused_and_the_reference_is_named(llama):
    with pytest.raises(NeighborError, match=r'got 1.*bank="reference"'):
        run(llama, random_tokens(1, 40), Compression(k=K))


@pytest.mark.many
@pytest.mark.parametrize("exclude", ["sequence", "self", "document"])
def test_a_bank_of_too_few_documents_is_refused_before_any_work(llama, exclude):
    """The prompt itself is none of them."""
    prompt, *others = (bl.Passage(text, doc=f"doc {at}") for at, text in enumerate(TEXTS[:4]))
    again = bl.Passage(prompt.text, doc="another name")
    few = bl.Capture.from_texts(llama, [*others[:2], again], progress=False)
    analyzer = Compression(k=K, exclude=exclude, nulls=False)
    with pytest.raises(NeighborError, match=r'bank of at least 3.*got 2.*bank="reference"'):
        run(llama, prompt, analyzer, bank=few, layers=[1])
    enough = bl.Capture.from_texts(llama, [*others, again], progress=False)
    assert run(llama, prompt, analyzer, bank=enough, layers=[1])["compression"].notna().any()


@pytest.mark.many
@pytest.mark.parametrize("blocks", [1, 2])
def test_loops_over_a_plain_transformers_model_agree(blocks):
    """The token in its prompt, its partners in their texts: images by rerunning the plain model, variances and means in float64."""
    tokens, scale, k = random_tokens(1, 12, seed=9), 0.7, 5
    model, bridge = make_hf("llama"), make_bridge("llama")
    both = tokens, random_tokens(SEQUENCES, 12)
    mine = bl.Capture.from_texts(bridge, both[1], progress=False)
    kept = {}

    class Watched(CrossedPass):
        def crossed(self, *given):
            kept[self.layer] = super().crossed(*given), [side.found.near.rows for side in (self.own, self.partners)]
            return kept[self.layer][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basin_lens.scoring.map_scores.CrossedPass", Watched)
        table = run(bridge, tokens, Parts(k=k, scale=scale, blocks=blocks, displaced=("neighbors",)), bank=mine)
    with torch.no_grad():
        held = [model(t, output_hidden_states=True).hidden_states for t in both]
    for layer in range(3 - blocks + 1):
        crossed, near = kept[layer]
        states = held[1][layer].reshape(-1, held[1][layer].shape[-1]).double().numpy()
        here = table[table.layer == layer]
        assert len(crossed.rows) == 11
        for group in crossed.rows[::3].tolist():
            clouds = [states[near[min(p, 1)][row, :k].numpy()] for p, row in enumerate(group)]
            c = np.empty((SIZE, SIZE))
            for p, row in enumerate(group):
                text, pos = both[min(p, 1)][row // 12], row % 12
                for q in range(SIZE):
                    moves = clouds[q] - clouds[q].mean(0)
                    points = clouds[p].mean(0) + scale * np.concatenate([moves, -moves])
                    images = plain_images(model, layer, text, pos, torch.tensor(points, dtype=torch.float32), blocks)
                    c[p, q] = math.log(variance(points) / variance(images))
            for name, expected in zip(("inter", "place", "dirs"), parts_by_loops(c), strict=True):
                got = here[f"neighbors_{name}"].to_numpy()[group[0]]
                assert got == pytest.approx(expected[0], abs=1e-4), (layer, name)


# -- one long text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(everywhere=True)
def test_partners_of_one_long_text_are_of_its_other_sequences(llama):
    """Where its own sequences are enough; documents come first, and a bank's partners are of documents."""
    cut = bl.Capture.from_texts(llama, bl.Passage(" ".join(TEXTS), doc="book"), max_length=24, progress=False)
    assert len(cut.sequences) >= 4
    score = Compression(k=4, group=3)
    kept = scored(llama, cut, Request([score], layers=[1], progress=False), keep_neighbors_of=score)
    facts = facts_of(kept.table)["groups"]["1"]["compression"]
    assert facts["units"] == "sequence" and facts["partners"] == "texts"
    groups = cut.row_seq.numpy()[kept.neighbors.groups[0]]
    assert len(groups) and all(len(set(group)) == 3 for group in groups.tolist())
    with pytest.raises(NeighborError, match="different values of 'document'"):
        run(llama, cut, Compression(k=4, group=3, exclude="document"), layers=[1])
    many = run(llama, random_tokens(8, 14), score, layers=[1])
    assert facts_of(many)["groups"]["1"]["compression"]["units"] == "document"
    other = bl.Capture.from_texts(llama, random_tokens(8, 14, seed=5), layers=[1], progress=False)
    banked = facts_of(run(llama, cut, score, layers=[1], bank=other))["groups"]["1"]["compression"]
    assert banked["partners"] == "bank" and banked["units"] == "document"


@pytest.mark.slow
def test_on_random_weights_its_mean_is_0_within_its_error(llama):
    """Weights that learned nothing have no basins, whosever tokens the partners are. Provenance says what intervals leave out."""
    texts, bank = (bl.Capture.from_texts(llama, random_tokens(30, 12, seed=s), layers=[1, 2], progress=False) for s in (1, 2))
    score = Compression(k=6, group=3, nulls=("random_sets",), partners="bank")
    table = bl.analyze(llama, texts, [score], bank=bank, progress=False)
    for layer in (1, 2):
        here = table[table.layer == layer].dropna(subset=["compression"])
        assert len(here) > 250
        for column in ("compression", "compression_above_random_sets"):
            means = here.groupby("doc")[column].mean()
            error = means.std(ddof=1) / math.sqrt(len(means))
            print(f"layer {layer}, {column}: {means.mean():+.5f} +- {error:.5f}")
            assert abs(means.mean()) < 3.5 * error
        assert facts_of(table)["groups"][str(layer)]["compression"]["intervals"].startswith("given this bank")
