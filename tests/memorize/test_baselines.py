"""Baselines of membership inference; slopes and matching."""

import itertools
import math
import zlib

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from sklearn.metrics import roc_auc_score

import basin_lens as bl
from basin_lens import model as door
from basin_lens.errors import StudyError, TableError
from tests.conftest import (
    TEXTS,
    make_bridge,
    random_tokens,
)
from tests.memorize.learners import NAN, A, M, S, logits_of

# -- baselines -------------------------------------------------------------------------------------------------------------------------


def surprisals(*rows):
    table = pd.DataFrame([(i, f"d{i}", i, pos, x) for i, row in enumerate(rows) for pos, x in enumerate([NAN, *row])])
    return table.set_axis(["passage", "doc", "seq", "pos", "surprisal"], axis=1)


def test_baselines_by_hand():
    table = surprisals([1, 2, 3, 4, 5], [0.5, 1.5]).assign(member=[True] * 6 + [False] * 3)
    table["standardized_likelihood"] = [NAN, -3.0, 1, 2, 0, NAN, NAN, 0.25, 0.5]
    table["agreement"] = [NAN, 1, 1, 0, 0, 0, NAN, 1, 1]
    both = pd.concat([table.assign(layer=0), table.assign(surprisal=99.0, layer=1)])  # the second layer is not read
    texts = ["a cat " * 9, "The"]
    got = M.likelihood_baselines(
        both, texts, lowercase=surprisals([6, 6, 6], [2]), reference=surprisals([4] * 5, [1, 1])
    )  # fmt: skip
    assert got.member.tolist() == [True, False] and got.doc.tolist() == ["d0", "d1"]
    expected = {
        "log_likelihood": [-3, -1], "lowercase": [-3 / 6, -1 / 2], "reference": [1, 0], "min_k": [-5, -1.5], "min_k_plus": [-3, 0.25],
        "agreement": [0.4, 1], "zlib": [-3 / len(zlib.compress(texts[0].encode())), -1 / len(zlib.compress(b"The"))],
    }  # fmt: skip
    for name, values in expected.items():
        assert got[name].tolist() == pytest.approx(values), name
    for share, values in ((0.4, [-4.5, -1.5]), (1.0, [-3, -1])):
        assert M.likelihood_baselines(table, texts, share=share).min_k.tolist() == values
    alike = M.likelihood_baselines(table, texts, lowercase=table, reference=table)
    assert (alike.lowercase == -1).all() and (alike.reference == 0).all()
    for share in (0.0, 1.5, NAN):
        with pytest.raises(TableError, match="share"):
            M.likelihood_baselines(table, texts, share=share)
    with pytest.raises(TableError, match="reference model"):
        M.likelihood_baselines(table, texts, reference=table[table.seq == 0])
    with pytest.raises(TableError, match="surprisal"):
        M.likelihood_baselines(table.drop(columns="surprisal"), texts)


def in_pieces(length: int) -> tuple[pd.DataFrame, str]:
    """A text of two sequences of eight tokens, each token so many characters, and its surprisal."""
    text = "".join(f"{n:0{length}x}" for n in range(16))
    numbers = np.arange(16)
    table = pd.DataFrame({"passage": 0, "doc": "d", "seq": numbers // 8, "pos": numbers % 8, "surprisal": 1.0 + numbers})
    table = table.assign(start=length * numbers, end=length * (numbers + 1))
    return table.assign(surprisal=table.surprisal.where(table.pos > 0)), text


def test_baselines_of_a_part_of_a_text_are_divided_by_that_part():
    """The whole text's bytes were taken for each of its parts: a long text looked memorized nowhere."""
    table, text = in_pieces(9)
    other = pd.concat([table, surprisals([1.0, 2]).assign(passage=1, doc="e", seq=2, start=[0, 3, 4], end=[3, 4, 5])])
    got = M.likelihood_baselines(other, [text, "short"])
    sizes = [len(zlib.compress(part.encode())) for part in (text[:72], text[72:], "short")]
    assert got.zlib.tolist() == pytest.approx((got.log_likelihood / sizes).tolist(), abs=0)
    bare = table.drop(columns=["start", "end"])
    for lost in (bare, table.assign(start=-1, end=-1)):
        with pytest.raises(TableError, match=r"start and end.*several sequences, got none.*max_length"):
            M.likelihood_baselines(lost, [text])
    alone = M.likelihood_baselines(bare[bare.seq == 0], [text])
    assert alone.zlib[0] == alone.log_likelihood[0] / len(zlib.compress(text.encode()))


def test_lower_case_of_a_part_of_a_text_is_that_parts():
    table, text = in_pieces(9)
    lower = table.assign(surprisal=[NAN, *range(20, 35)], seq=0, pos=range(16))  # one longer sequence, as lower case may be cut
    got = M.likelihood_baselines(table, [text], lowercase=lower)
    assert got.lowercase.tolist() == pytest.approx([-5.0 / 23, -13.0 / 30.5])
    with pytest.raises(TableError, match="characters move"):
        M.likelihood_baselines(table, [text[:-1] + "\u0130"], lowercase=lower)


def test_standardized_likelihood_and_agreement_from_the_logits(tokenizer):
    model, tokens = make_bridge("llama", tokenizer=tokenizer), random_tokens(4, 12)
    logits, follow = logits_of(model, tokens)[:, :-1].double().numpy(), tokens[:, 1:].numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(log_p)
    mu = (p * log_p).sum(-1)
    sigma = np.sqrt((p * log_p**2).sum(-1) - mu**2)
    z = (np.take_along_axis(log_p, follow[..., None], -1)[..., 0] - mu) / sigma
    chosen = [A.StandardizedLikelihood(), A.Agreement()]
    table = bl.analyze(model, tokens, chosen, layers=[1], progress=False)
    assert table.standardized_likelihood[table.pos > 0].to_numpy() == pytest.approx(z.ravel(), rel=1e-4, abs=1e-5)
    assert table.agreement[table.pos > 0].tolist() == (logits.argmax(-1) == follow).ravel().tolist()
    assert table[["standardized_likelihood", "agreement"]][table.pos == 0].isna().all(axis=None)
    # A prediction that does not vary has no standard deviations.
    next(p for name, p in door.parameters_of(model).items() if "lm_head" in name).data.zero_()
    assert bl.analyze(model, tokens, chosen, progress=False).standardized_likelihood.isna().all()


@pytest.mark.slow(everywhere=True)
def test_every_baseline_is_higher_once_a_text_is_memorized(learner, tuned):
    chosen, texts = [A.Surprisal(), A.Agreement(), A.StandardizedLikelihood()], TEXTS[1:2]
    reference = bl.analyze(learner, texts, chosen, layers=[0], progress=False)
    found = []
    for model in (learner, tuned.model):
        table, lower = (bl.analyze(model, t, chosen, layers=[0], progress=False) for t in (texts, [texts[0].lower()]))
        found.append(M.likelihood_baselines(table, texts, lowercase=lower, reference=reference).iloc[0])
    for name in (*M.LOSS_BASELINES, "reference"):
        assert found[1][name] > found[0][name], name
    assert M.extract(tuned.model, TEXTS[1:3], prompt=8, target=16, progress=False).extracted.tolist() == [True, False]


def test_sequence_states_are_means_without_the_first_token(llama):
    capture = bl.Capture.from_texts(llama, TEXTS, progress=False)
    for seq, row in enumerate(M.sequence_states(capture, 1)):
        own = capture.resid_pre(1)[(capture.row_seq == seq) & (capture.row_pos > 0)]
        assert row == pytest.approx(own.double().mean(0).numpy())


def paired(n=20, seed=0):
    """Labels of pairs, and splits of them."""
    rng, groups = np.random.default_rng(seed), np.repeat(range(n), 2)
    label = (np.arange(2 * n) % 2) == np.repeat(rng.integers(0, 2, n), 2)
    return rng, label, groups, M.folds(label, groups, seed=seed)


def test_folds_hold_every_text_out_once_and_split_no_group():
    _, label, groups, parts = paired()
    assert sorted(np.concatenate([held for _, held in parts]).tolist()) == list(range(40))
    for fitted, held in parts:
        assert not set(groups[fitted]) & set(groups[held]) and set(fitted) | set(held) == set(range(40))
    with pytest.raises(StudyError, match="at least 5 texts"):
        M.folds(label[:8], groups[:8])
    # One author wrote all that was memorized: some split would have nothing of it to fit on.
    with pytest.raises(StudyError, match="in as many groups, got 1"):
        M.folds(np.repeat([True, False], 5), np.array([0] * 5 + [1, 2, 3, 4, 5]))


def first_words(x):
    return [" ".join(f"w{i}" for i in row.argsort()[:4]) for row in x]


DETECTORS = {
    "probe": M.linear_probe,
    "nearest": M.nearest_memorized,
    "blind": lambda x, label, parts: M.blind_classifier(first_words(x), label, parts),
}


@pytest.mark.many
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_detectors_never_see_the_labels_that_they_are_asked_for(detector):
    rng, label, _, parts = paired()
    x = rng.normal(size=(40, 8)) - 3 * label[:, None] * (np.arange(8) < 2)
    for fitted, held in parts:
        flipped = label.copy()
        flipped[held] ^= True
        answer = detector(x, label, [(fitted, held)])
        assert np.array_equal(answer[held], detector(x, flipped, [(fitted, held)])[held]) and np.isnan(answer[fitted]).all()
    assert roc_auc_score(label, detector(x, label, parts)) > 0.75
    chance = [roc_auc_score(y, detector(r.normal(size=(40, 8)), y, p)) for r, y, _, p in (paired(seed=s) for s in range(24))]
    assert abs(np.mean(chance) - 0.5) < min(0.06, 4 * np.std(chance) / math.sqrt(24))


# -- slopes and matching ---------------------------------------------------------------------------------------------------------------


def dosed(layers, units=24, slope=0.0):
    """Two sequences of four tokens per unit, with noise of units that grows with the dose."""
    rng = np.random.default_rng(0)
    places = itertools.product(range(layers), range(units), range(2), range(4))
    table = pd.DataFrame(places, columns=["layer", "unit", "half", "pos"])
    table = table.assign(doc="d" + table.unit.astype(str), seq=2 * table.unit + table.half, dose=(table.unit % 4).astype(float))
    noise = rng.normal(size=(layers, units)) * (1 + np.arange(units) % 4)
    table["a"] = slope * table.dose + noise[table.layer, table.unit] + rng.normal(size=len(table))
    return table


def test_slope_is_least_squares_over_unit_means_with_hc3():
    table = dosed(2, slope=0.5).drop(index=[0, 1, 9])  # unequal numbers of tokens
    table.loc[12, "a"] = np.nan
    found = S.unit_slope(table, "a", "dose", n_resamples=199)
    for layer, row in zip(range(2), found.itertuples(), strict=True):
        means = table[table.layer == layer].groupby(["doc", "seq"])[["a", "dose"]].mean().groupby("doc").mean()
        fitted = sm.OLS(means.a, sm.add_constant(means.dose)).fit(cov_type="HC3", use_t=True)
        assert [row.estimate, row.low, row.high] == pytest.approx([fitted.params["dose"], *fitted.conf_int().loc["dose"]])
        assert row.rho == pytest.approx(means.corr("spearman").loc["a", "dose"]) and row.n_units == 24


@pytest.mark.slow
def test_slope_has_its_false_positive_rate_its_coverage_and_power():
    null, planted = (S.unit_slope(dosed(250, slope=slope), "a", "dose", n_resamples=199) for slope in (0.0, 2.0))
    assert (null.p <= 0.05).mean() == pytest.approx(0.05, abs=0.035) and (planted.p <= 0.05).mean() > 0.8
    for found, truth in ((null, 0), (planted, 2)):
        assert ((found.low <= truth) & (found.high >= truth)).mean() == pytest.approx(0.95, abs=0.04)


def test_slopes_that_cannot_be_are_refused_or_have_no_interval():
    table = dosed(1)
    for bad, error, said in (
        (table.assign(dose=table.dose + 1e-6 * table.half + 100), TableError, "changes within one"),
        (table.assign(dose=1.0), TableError, "varies"), (table.assign(a=1.0), TableError, "varies"),
        (table[table.unit < 5], StudyError, "at least 6"), (table.drop(columns="dose"), TableError, "'dose'"),
        (table.assign(dose=table.doc), TableError, "numbers"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            S.unit_slope(bad, "a", "dose")
    with pytest.raises(StudyError, match="max-t"):
        S.unit_slope(table, "a", "dose", correction="max-t", n_resamples=99)
    # Rows without a dose are passed over.
    assert S.unit_slope(table.assign(dose=table.dose.where(table.unit >= 4)), "a", "dose", n_resamples=99).n_units[0] == 20
    alone = S.unit_slope(table.assign(dose=(table.unit == 3) * 1.0), "a", "dose", n_resamples=99).iloc[0]
    assert math.isnan(alone.low) and math.isnan(alone.high) and math.isfinite(alone.p) and "one value of dose" in alone.note


def best_matching(first, second, caliper):
    """Of all ways to pair, those of most pairs, and of them the smallest sum of differences."""
    best = (0, 0.0)
    for chosen in set(itertools.permutations([*range(len(second)), *[None] * len(first)], len(first))):
        apart = [abs(a - second[j]) for a, j in zip(first, chosen, strict=True) if j is not None]
        best = min(best, (-len(apart), sum(apart))) if all(d <= caliper for d in apart) else best
    return -best[0], best[1]


def test_matching_makes_the_most_pairs_and_the_closest():
    rng = np.random.default_rng(0)
    for trial in range(30):
        counts, caliper = rng.integers(1, 5, 2), float(rng.choice([0.2, 1.0, 50.0]))
        label = np.repeat([True, False], counts)
        loss = rng.normal(size=len(label)).round(1 if trial % 2 else 6)
        by = pd.DataFrame({"m": label, "loss": loss}, index=[f"d{i}" for i in rng.permutation(len(label))])
        pairs = S.match_units(by.rename_axis("doc").reset_index().sample(frac=1, random_state=trial), "m", "loss", caliper=caliper)
        count, total = best_matching(loss[label], loss[~label], caliper)
        assert len(pairs) == count and (pairs["first"] - pairs.second).abs().sum() == pytest.approx(total)
        for name, wanted, held in (("with_label", True, "first"), ("without_label", False, "second")):
            assert pairs[name].is_unique and (by.loc[pairs[name], "m"] == wanted).all()
            assert by.loc[pairs[name], "loss"].tolist() == pairs[held].tolist()


def test_matching_prefers_another_pair_to_a_closer_one():
    table = pd.DataFrame({"doc": list("abcd"), "m": [True, True, False, False], "loss": [0.0, 1.0, 0.95, 1.9]})
    assert S.match_units(table, "m", "loss", caliper=1.0).values.tolist() == [["a", "c", 0, 0.95], ["b", "d", 1, 1.9]]


def test_matching_within_over_rows_and_what_it_refuses():
    table = pd.DataFrame(
        {"doc": list("aabbccdd"), "m": [True] * 4 + [False] * 4, "loss": [1.0, 3, 5, 5, 2, 2, 5, 5], "kind": list("xxyyyyxx")}
    )
    assert S.match_units(table, "m", "loss", caliper=9.0).values.tolist() == [["a", "c", 2, 2], ["b", "d", 5, 5]]
    assert S.match_units(table, "m", "loss", caliper=9.0, within=["kind"]).values.tolist() == [["a", "d", 2, 5], ["b", "c", 5, 2]]
    for some, options in ((table, {"within": ["kind"]}), (table[table.m], {})):
        nothing = S.match_units(some, "m", "loss", caliper=2.0, **options)
        assert nothing.empty and list(nothing) == ["with_label", "without_label", "first", "second"]
    unknown = table.assign(m=table.m.astype(object).where(table.doc != "a"), loss=table.loss.where(table.doc != "d"))
    assert S.match_units(unknown, "m", "loss", caliper=9.0).values.tolist() == [["b", "c", 5, 2]]
    for change, options, said in (
        ({}, {"caliper": 0.0}, "above 0"), ({}, {"caliper": NAN}, "above 0"), ({"m": [True, False] * 4}, {}, "changes"),
        ({"kind": list("xyyyyyxx")}, {"within": ["kind"]}, "changes"), ({}, {"unit": "case"}, "'case'"),
    ):  # fmt: skip
        with pytest.raises(TableError, match=said):
            S.match_units(table.assign(**change), "m", "loss", **{"caliper": 1.0} | options)
