"""Options of the search: which neighbors, which bank, which tokens, what is left out."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers.control import controls_of
from basin_lens.errors import NeighborError
from basin_lens.texts import reference_passages
from basin_lens.transport import LayerMaps
from tests.conftest import TEXTS, replace_in_all_rooms
from tests.scoring.oracle import ALL_CLOUDS, LAYERS, A, Oracle, column, facts_of, near, run, some_rows, variance

# -- options of the search -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labeled(llama):
    """Two documents of three texts each, and a template label on four of the six."""
    passages = [
        bl.Passage(text, doc="ab"[i % 2], labels={"template": i % 3} if i < 4 else {}, spans={"start": (0, 9)})
        for i, text in enumerate(TEXTS)
    ]
    return bl.Capture.from_texts(llama, passages, progress=False)


class LabelOracle(Oracle):
    """A passage without the label is of no group."""

    def list(self, capture):
        return [{"template": object(), **item} for item in super().list(capture)]


@pytest.mark.many
@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "self"},
        {"exclude": "sequence"},
        {"exclude": "document"},
        {"exclude": "template"},
        {"same_token": "only"},
        {"same_token": "exclude"},
        {"same_token": "exclude", "exclude": "self"},
        {"metric": "cosine"},
        {"position_0": True},
        {"position_0": True, "exclude": "self", "same_token": "exclude"},
    ],
    ids=str,
)
def test_neighbors_are_the_oracles(llama, labeled, options):
    k = 2 if options.get("same_token") == "only" else 6
    table = run(llama, labeled, A.Neighborhood(k=k, **options), A.Contraction(k=k, context="native", **options))
    for layer in LAYERS:
        oracle = LabelOracle(llama, labeled, layer)
        found = [oracle.neighbors(row, k, **options) for row in range(labeled.n_rows)]
        scored = np.array([f is not None for f in found])
        assert (column(table, "radius", layer) >= 0).tolist() == scored.tolist()
        if layer == 0 and options.get("same_token") == "only":
            assert not scored.any()  # equal tokens have equal states there
            continue
        rows, distances = (np.stack([f[i] for f in found if f is not None]) for i in (0, 1))
        assert column(table, "radius", layer)[scored] == near(distances[:, -1], abs=1e-5, rel=1e-4)
        assert column(table, "nearest", layer)[scored] == near(distances[:, 0], abs=1e-5, rel=1e-4)
        if scored.sum() == labeled.n_rows - len(TEXTS):
            counts = np.bincount(rows.ravel(), minlength=labeled.n_rows)
            assert column(table, "hubness", layer)[scored].tolist() == counts[scored].tolist()
        expected = np.log(variance(oracle.pre[rows]) / variance(oracle.post[rows]))
        assert column(table, "contraction", layer)[scored] == near(expected, abs=1e-3)


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "native"])
def test_position_0_is_let_in_as_neighbor_and_as_random_point_alone(llama, capture, context):
    """As the oracle has it; what is scored stays as it was."""
    k = 6
    scores = [A.Contraction(k=k, context=context, position_0=p, name=f"r{p}") for p in (False, True)]
    table = run(llama, capture, *scores, *controls_of(scores))
    assert table.rTrue.notna().tolist() == table.rFalse.notna().tolist() == (table.pos > 0).tolist()
    for layer in LAYERS:
        oracle = Oracle(llama, capture, layer)
        found = {row: oracle.neighbors(row, k, position_0=True)[0] for row in np.flatnonzero(capture.row_pos.numpy() > 0)}
        with_first = [row for row, rows in found.items() if (capture.row_pos.numpy()[rows] == 0).any()]
        assert with_first and len(with_first) < len(found)
        at = table[table.layer == layer].reset_index(drop=True)
        changed = np.flatnonzero((at.rTrue - at.rFalse).abs() > 1e-6).tolist()
        # A first token pushes another neighbor out, so where there is one the score is another; but bare embeddings of one token
        # are equal.
        assert set(changed) <= set(with_first) and (changed == with_first or layer == 0) and changed
        for row in with_first[:3]:
            expected = math.log(variance(oracle.pre[found[row]]) / variance(oracle.images(row, found[row], context)))
            assert at.rTrue[row] == near(expected, abs=1e-3)
        inner = at[at.pos > 0]
        assert 0 < (inner.rTrue_random - inner.rFalse_random).abs().gt(1e-6).mean() < 1


def test_position_0_is_shown_and_counted_where_it_is_let_in(llama, capture):
    oracle = Oracle(llama, capture, 1)
    inner = np.flatnonzero(capture.row_pos.numpy() > 0).tolist()
    row = next(r for r in inner if (capture.row_pos[oracle.neighbors(r, 6, position_0=True)[0]] == 0).any())
    seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
    shown = bl.neighborhood(llama, capture, layer=1, seq=seq, pos=pos, k=6, position_0=True)
    rows = [capture.row_of(s, p) for s, p in zip(shown.seq, shown.pos, strict=True)]
    assert rows == oracle.neighbors(row, 6, position_0=True)[0].tolist()
    assert (shown.pos == 0).any()
    assert (bl.neighborhood(llama, capture, layer=1, seq=seq, pos=pos, k=6).pos > 0).all()
    with pytest.raises(NeighborError, match="never a query"):
        bl.neighborhood(llama, capture, layer=1, seq=seq, pos=0, k=6, position_0=True)
    most = int((capture.row_pos > 0).sum())
    for kind in (A.Compression, A.Contraction):
        with pytest.raises(NeighborError, match=rf"bank's {most} points \(position 0 left out\)"):
            run(llama, capture, kind(k=most + 1))
        with pytest.raises(NeighborError, match=f"bank's {capture.n_rows} points, got"):
            run(llama, capture, kind(k=capture.n_rows + 1, position_0=True))


def test_cosine_only_chooses(llama, capture):
    """Variances stay Euclidean whatever the neighbors were chosen by."""
    table = run(llama, capture, A.RawCompression(k=6, metric="cosine"))
    oracle = Oracle(llama, capture, 1)
    for row in some_rows(capture):
        rows, _ = oracle.neighbors(row, 6, metric="cosine")
        assert column(table, "raw_compression", 1)[row] == near(-math.log(variance(oracle.post[rows])))


@pytest.mark.many
@pytest.mark.parametrize("option", ["self", "sequence", "document", "template"])
def test_no_pair_that_is_passed_breaks_the_exclusion(llama, labeled, option, monkeypatch):
    """Neighbors, random points and those of the layer's random sets alike, and never position 0 or a token's own prefix."""
    pairs = []
    make = LayerMaps.map

    def watched(self, *given):
        made = make(self, *given)

        def of_rows(queries, rows):
            pairs.extend(
                (query, row) for query, many in zip(queries.tolist(), rows.tolist(), strict=True) for row in many if row >= 0
            )
            return made.of_rows(queries, rows)

        return dataclasses.replace(made, of_rows=of_rows)

    monkeypatch.setattr(LayerMaps, "map", watched)
    scores = [A.RelativeContraction(k=5, exclude=option)]
    run(llama, labeled, *scores, *controls_of(scores), layers=[1])
    assert len(pairs) > labeled.n_rows * 5
    items = LabelOracle(llama, labeled, 1).items
    for query, row in set(pairs):
        a, b = items[query], items[row]
        assert b["pos"] > 0
        assert a["key"] != b["key"]
        name = {"sequence": "seq", "document": "doc"}.get(option, option)
        assert option == "self" or a[name] != b[name]


def test_unknown_exclusion_names_the_labels(llama, labeled):
    with pytest.raises(NeighborError, match="template"):
        run(llama, labeled, A.Contraction(k=5, exclude="tmplate"))
    with pytest.raises(NeighborError, match="template"):
        run(llama, labeled, A.Compression(k=5, exclude="tmplate"))


def test_layer_0_has_no_equal_neighbors(world):
    """Equal tokens (at equal positions, where those are learned) enter block 0 with equal states: they count once."""
    model, capture = world
    absolute = capture.model["architecture"].startswith("GPT2")
    table = run(model, capture, A.Contraction(k=6, exclude="self"), A.Neighborhood(k=6, exclude="self"), layers=[0])
    scored = table[table.pos > 0]
    assert scored.contraction.notna().all()
    assert (scored.nearest > 1e-3).all()
    for row in some_rows(capture):
        seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
        who = bl.neighborhood(model, capture, 0, seq, pos, k=20, exclude="self", context="native")
        keys = list(zip(who.token, who.pos if absolute else [0] * 20, strict=True))
        assert len(set(keys)) == 20
        assert (scored.token.loc[row], pos if absolute else 0) not in keys
    assert scored.same_token_share.max() > 0 if absolute else scored.same_token_share.max() == 0


# -- banks -----------------------------------------------------------------------------------------------------------------------------


def test_another_bank_is_where_the_neighbors_come_from(llama):
    capture, bank = (bl.Capture.from_texts(llama, texts, progress=False) for texts in (TEXTS[:2], TEXTS[2:]))
    table = run(llama, capture, A.Contraction(k=6), A.Neighborhood(k=6), bank=bank)
    assert table.hubness.isna().all()
    assert facts_of(table)["bank"]["source"] == "another capture"
    assert facts_of(table)["bank"]["points"] == bank.n_rows - len(TEXTS[2:])
    for layer in LAYERS:
        oracle = Oracle(llama, capture, layer, bank)
        for row in some_rows(capture):
            rows, distances = oracle.neighbors(row, 6)
            assert column(table, "radius", layer)[row] == near(distances[-1])
            images = oracle.images(row, rows, "patched")
            assert column(table, "contraction", layer)[row] == near(math.log(variance(oracle.pre[rows]) / variance(images)))


@pytest.mark.slow(everywhere=True)
def test_the_same_texts_as_another_bank_change_nothing(llama, capture):
    """The same text is the same sequence, also in another capture: its tokens are no neighbors of theirs."""
    twin = bl.Capture.from_texts(llama, TEXTS, progress=False)
    inside, outside = (run(llama, capture, *ALL_CLOUDS, A.Compression(k=6), bank=bank) for bank in (None, twin))
    crossed = [column.name for column in A.Compression().columns]
    for name in (*crossed, "other", "contraction", "raw_compression", "radius", "nearest", "same_token_share"):
        assert outside[name].to_numpy() == near(inside[name].to_numpy(), nan_ok=True), name


def test_the_guides_score_refuses_another_bank(llama, capture):
    twin = bl.Capture.from_texts(llama, TEXTS[:3], progress=False)
    with pytest.raises(NeighborError, match="SeedCompression"):
        run(llama, capture, A.SeedCompression(k=4), bank=twin)


def test_one_text_needs_a_bank(llama):
    with pytest.raises(NeighborError, match="reference"):
        run(llama, TEXTS[0], A.Compression(k=5))


@pytest.mark.slow
def test_the_reference_bank_is_read_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path))
    passes = []
    until = door.pass_until
    replace_in_all_rooms(monkeypatch, "pass_until", lambda *given, **options: (passes.append(1), until(*given, **options))[1])
    first = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank="reference", layers=[1])
    assert len(list((tmp_path / "reference").iterdir())) == 1
    reading = len(passes)
    again = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank="reference", layers=[1])
    assert len(passes) - reading < reading
    assert len(passes) - reading == 1  # the text itself
    assert first.contraction.equals(again.contraction)
    assert first.contraction[1:].notna().all()
    bank = bl.Capture.from_texts(llama, list(reference_passages()), layers=[1], progress=False)
    given = run(llama, TEXTS[0], A.Contraction(k=15, context="native"), A.Neighborhood(), bank=bank, layers=[1])
    for name in ("contraction", "radius"):
        assert given[name].to_numpy() == near(first[name].to_numpy(), nan_ok=True)


# -- which tokens are scored -----------------------------------------------------------------------------------------------------------


def queries_cases(capture):
    pos, seq = capture.row_pos.numpy(), capture.row_seq.numpy()
    mask = np.random.default_rng(0).random(capture.n_rows) < 0.3
    grid = torch.zeros(capture.valid.shape, dtype=torch.bool)
    grid[capture.valid] = torch.tensor(mask)
    start = np.array([[0 <= a < 9 for a in s.starts] for s in capture.sequences], dtype=object)
    return {
        "positions": ([3, 7], np.isin(pos, [3, 7])),
        "rows mask": (mask, mask),
        "grid mask": (grid, mask),
        "label": ("template", np.isin(seq, [1, 2])),  # template 0 is no
        "span": ("start", np.array([inside for row in start for inside in row])),
    }


@pytest.mark.many
@pytest.mark.parametrize("case", ["positions", "rows mask", "grid mask", "label", "span"])
def test_queries_choose_what_is_scored_and_nothing_else(llama, labeled, case):
    queries, expected = queries_cases(labeled)[case]
    analyzers = (A.Contraction(k=6), A.RawCompression(k=6), A.Neighborhood(k=6))
    full, some = run(llama, labeled, *analyzers), run(llama, labeled, *analyzers, queries=queries)
    inner = labeled.row_pos.numpy() > 0
    for layer in LAYERS:
        for name in ("contraction", "raw_compression", "radius", "nearest"):
            got, whole = column(some, name, layer), column(full, name, layer)
            assert np.isnan(got).tolist() == (~(expected & inner)).tolist(), name
            assert got[expected & inner] == near(whole[expected & inner]), name
    counts = facts_of(some)["left_out"]["contraction"]
    assert counts["not asked for"] == 3 * int((~expected & inner).sum())
    assert facts_of(some)["queries"] == f"{expected.sum()} of {labeled.n_rows} tokens"
    assert facts_of(some)["bank"] == facts_of(full)["bank"]


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "solo"])
@pytest.mark.parametrize("queries", ["start", [3, 7], 4], ids=str)
def test_what_a_layer_does_to_random_sets_is_no_matter_of_who_is_asked_for(llama, labeled, queries, context):
    score = A.RelativeContraction(k=6, context=context)
    full, some = (run(llama, labeled, score, layers=[1], queries=q) for q in (None, queries))
    asked = some.relative_contraction.notna()
    assert asked.sum() > 3
    assert some.relative_contraction[asked].to_numpy() == near(full.relative_contraction[asked].to_numpy())


@pytest.mark.many
@pytest.mark.parametrize("queries", ["start", [3, 7], 40], ids=str)
def test_groups_are_formed_among_those_asked_for(llama, queries):
    passages = [bl.Passage(text, spans={"start": (0, 9)}) for text in TEXTS]
    capture = bl.Capture.from_texts(llama, passages, progress=False)
    full, some = (run(llama, capture, A.Compression(k=6, nulls=False), layers=[1], queries=q) for q in (None, queries))
    asked = facts_of(some)["left_out"]["compression"]["not asked for"]
    inner = int((some.pos > 0).sum())
    scored = some.compression.notna()
    assert 0 < scored.sum() <= inner - asked < full.compression.notna().sum()
    assert facts_of(some)["left_out"]["compression"].get("no group", 0) == inner - asked - scored.sum()


def test_a_number_of_queries_is_a_seeded_sample(llama, labeled):
    tables = [run(llama, labeled, A.Contraction(k=6), queries=17, seed=seed) for seed in (0, 0, 1)]
    chosen = [tuple(np.flatnonzero(table.contraction.notna() & (table.layer == 1))) for table in tables]
    assert [len(rows) for rows in chosen] == [17] * 3
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("queries", ["no such label", 0, [999], np.zeros(3, bool), [0.5]], ids=str)
def test_queries_that_choose_nothing_are_refused(llama, labeled, queries):
    with pytest.raises(NeighborError):
        run(llama, labeled, A.Contraction(k=6), queries=queries)


# -- what is left out ------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
def test_position_0_has_no_cloud_score(world):
    model, capture = world
    crossed = A.Compression(k=6)
    table = run(model, capture, *ALL_CLOUDS, crossed)
    names = [c.name for a in ALL_CLOUDS for c in a.columns]
    assert table.loc[table.pos == 0, [*names, *(c.name for c in crossed.columns)]].isna().all().all()
    assert table.loc[table.pos > 0, names].notna().all().all()
    # Beyond it, all but those without a group.
    alone = facts_of(table)["left_out"]["compression"].get("no group", 0)
    assert table.compression.notna().sum() == (table.pos > 0).sum() - alone > 0


@pytest.mark.many
@pytest.mark.parametrize("queries", [None, [2, 3], 20])
def test_counts_add_up_to_what_is_missing(llama, labeled, queries):
    analyzers = (
        *ALL_CLOUDS, A.Contraction(k=3, same_token="only", name="same"), A.SeedCompression(k=5), A.Compression(k=4, exclude="template")
    )  # fmt: skip
    table = run(llama, labeled, *analyzers, queries=queries)
    left_out = facts_of(table)["left_out"]
    assert set(left_out) == {c.name for a in analyzers for c in a.columns}
    for name, counts in left_out.items():
        assert sum(counts.values()) == int(table[name].isna().sum()), name
    assert left_out["same"]["too few neighbors"] > 0
    assert left_out["seed_compression"]["position 0"] == 0


# -- neighborhood() --------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("context", ["patched", "native", "solo"])
def test_neighborhood_shows_the_neighbors_behind_the_scores(world, context):
    model, capture = world
    k = 7
    table = run(model, capture, A.Neighborhood(k=k))
    for layer in LAYERS:
        oracle = Oracle(model, capture, layer)
        for row in some_rows(capture, 3):
            seq, pos = int(capture.row_seq[row]), int(capture.row_pos[row])
            who = bl.neighborhood(model, capture, layer, seq, pos, k=k, context=context)
            rows, distances = oracle.neighbors(row, k)
            assert who["rank"].tolist() == list(range(1, k + 1))
            assert [capture.row_of(s, p) for s, p in zip(who.seq, who.pos, strict=True)] == rows.tolist()
            assert who.distance_before.to_numpy() == near(distances)
            after = np.linalg.norm(oracle.images(row, rows, context) - oracle.post[row], axis=1)
            assert who.distance_after.to_numpy() == near(after)
            here = table[table.layer == layer].iloc[row]
            assert who.distance_before.iloc[-1] == near(here.radius)
            assert who.distance_before.iloc[0] == near(here.nearest)
            assert (who.token == here.token).mean() == near(here.same_token_share)
            assert (who.pos == pos).mean() == near(here.same_position_share)
            assert who.token.nunique() == here.distinct_tokens
            assert who.doc.tolist() == [capture.docs[s] for s in who.seq]
            strings = capture.row_strings()
            assert who.token.tolist() == [strings[r] for r in rows]
            assert all(f"[{token}]" in text for token, text in zip(who.token, who.text, strict=True))


def test_neighborhood_refuses_the_first_token(llama, capture):
    with pytest.raises(NeighborError, match="position"):
        bl.neighborhood(llama, capture, 1, 0, 0)
