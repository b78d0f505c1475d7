"""A merger: its statistics, hooks, files and options."""

import inspect
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from basin_lens import merging, records
from basin_lens import model as door
from basin_lens.errors import MergeError, StoreError
from basin_lens.merging import TokenMerger
from tests.conftest import make_bridge, random_tokens
from tests.merging.mergers import KINDS, LENGTH, count_hooks, make_merger, merged_logits

# -- what it says happened -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_held(tiny, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(1, LENGTH)
    for length in (2, 9, LENGTH):
        merger.forget()
        merged_logits(merger, tiny, tokens[:, :length])
        with merging.streaming(merger, tiny, 1) as stream:
            for token in tokens[0, :length]:
                stream.step(token[None])
            told = merger.statistics()
            assert told.bytes.tolist() == stream.nbytes()
            assert told.rows.tolist() == stream.rows()
            for layer in stream.layers:
                (held,) = layer.sequences
                assert held.keys.shape == held.values.shape == (2, len(held.places), 8)
    assert (told.full_bytes == LENGTH * 2 * 2 * 8 * 8).all()


def test_statistics_against_counts_by_hand(tiny):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(2, LENGTH)
    merger.forget()
    for _ in range(2):
        with merger.attached(tiny), torch.no_grad():
            door.forward_pass(tiny, tokens, {})
            found, units = merger.pass_.assigned, merger.pass_.units
    told = merger.statistics()
    assert told["pass"].tolist() == [0, 0, 0, 1, 1, 1] and told.layer.tolist() == [0, 1, 2] * 2
    for row in told.iloc[3:].itertuples():
        f, u = found[row.layer], units[row.layer]
        merged = [(b, p, int(f.leader[b, p])) for b in range(2) for p in range(LENGTH) if f.joined[b, p]]
        assert (row.sequences, row.tokens, row.eligible, row.merged) == (2, 48, 2 * (LENGTH - 3), len(merged))
        assert row.rate == pytest.approx(len(merged) / 48) and row.rows == 48 - len(merged)
        assert row.clusters == row.eligible - len(merged)
        sizes = {}
        for b, _, leader in merged:
            sizes[b, leader] = sizes.get((b, leader), 1) + 1
        assert row.largest == max(sizes.values())
        cosine = [float(u[b, p] @ u[b, at] / u[b, p].norm() / u[b, at].norm()) for b, p, at in merged]
        assert row.similarity == pytest.approx(np.mean(cosine), abs=1e-6)
        assert row.level == pytest.approx(0.3, abs=1e-6)
    merger.forget()
    assert merger.statistics().empty


def test_layers_in_any_order(tiny):
    one, other = (
        make_merger(tiny, "leader"),
        TokenMerger([2, 0, 1], recent=2, threshold=0.3).calibrate(tiny, random_tokens(4, LENGTH, seed=9)),
    )
    tokens = random_tokens(2, LENGTH)
    assert torch.equal(merged_logits(one, tiny, tokens), merged_logits(other, tiny, tokens))
    assert other.statistics()["pass"].tolist() == [0, 0, 0]


# -- hooks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leader", "residual"])
def test_hooks_are_gone_after_an_error(tiny, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(1, LENGTH)
    before, plain = count_hooks(tiny), tiny(tokens, return_type="logits")
    for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
        with pytest.raises(ZeroDivisionError), context:
            1 / (count_hooks(tiny) <= before)
        assert count_hooks(tiny) == before and merger.pass_ is None
    assert torch.equal(tiny(tokens, return_type="logits"), plain)


def test_the_users_own_hooks_stay(tiny):
    seen = []
    target = tiny.hook_dict["blocks.1.hook_resid_pre"]
    handle = getattr(target, "_target", target).register_forward_hook(lambda *_: seen.append(1))
    try:
        merged_logits(make_merger(tiny, "leader"), tiny, random_tokens(1, LENGTH))
        seen.clear()
        tiny(random_tokens(1, 5), return_type="logits")
        assert seen == [1]
    finally:
        handle.remove()


def test_attached_twice_is_refused(tiny):
    merger = make_merger(tiny, "leader")
    with merger.attached(tiny):
        for context in (merger.attached(tiny), merging.streaming(merger, tiny, 1)):
            with pytest.raises(MergeError, match="Leave its block first"), context:
                pass
        with pytest.raises(MergeError, match="Leave its block first"):
            merger.calibrate(tiny, random_tokens())
    with merger.attached(tiny):
        pass


def test_a_cache_inside_attached_is_refused(tiny):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(1, 9)
    with pytest.raises(MergeError, match="key/value cache"), merger.attached(tiny):
        tiny.generate(
            tokens,
            max_new_tokens=2,
            do_sample=False,
            use_past_kv_cache=True,
            verbose=False,
            return_type="tokens",
            stop_at_eos=False,
        )


def test_another_model_and_wrong_shapes_are_refused(tiny, gpt2):
    merger, tokens = make_merger(tiny, "leader"), random_tokens(2, 9)
    with pytest.raises(MergeError, match="Make another merger"), merger.attached(gpt2):
        pass
    with pytest.raises(MergeError, match="layers below 3"):
        TokenMerger([3], threshold=0.5).prepare(tiny)
    with (
        pytest.raises(MergeError, match="expected valid of shape"),
        merger.attached(tiny, valid=torch.ones(2, 8, dtype=torch.bool)),
    ):
        door.forward_pass(tiny, tokens, {})
    scored = TokenMerger([0, 1], threshold=0.5, rule="score")
    for scores in (None, {0: torch.zeros(2, 9)}):
        with pytest.raises(MergeError, match="scores"), scored.attached(tiny, scores=scores):
            pass
    with pytest.raises(MergeError, match="of shape"), scored.attached(tiny, scores={0: torch.zeros(2, 8), 1: torch.zeros(2, 9)}):
        door.forward_pass(tiny, tokens, {})
    with pytest.raises(MergeError, match="only"), merger.attached(tiny, scores={0: torch.zeros(2, 9)}):
        pass


# -- on disk ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("kind", ["adaptive", "projected", "residual", "preserved"])
def test_saved_and_loaded_it_computes_the_same(tiny, tmp_path, kind):
    merger, tokens = make_merger(tiny, kind), random_tokens(2, LENGTH)
    merger.facts["note"] = [1, "two"]
    merger.save(tmp_path)
    loaded = TokenMerger.load(tmp_path, tiny)
    assert torch.equal(merged_logits(loaded, tiny, tokens), merged_logits(merger, tiny, tokens))
    assert loaded.options == merger.options and loaded.facts == merger.facts and loaded.calibrated
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"} and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(MergeError, match="Load that model"):
        TokenMerger.load(tmp_path, make_bridge("llama", seed=5))


def test_an_interrupted_save_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    merger, tokens, real = make_merger(tiny, "leader"), random_tokens(1, LENGTH), os.replace
    merger.save(tmp_path)
    old = merged_logits(merger, tiny, tokens)
    merger.weights.set_level(0, 0.9)
    for good in (0, 1):
        left = [good]

        def torn(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("no space left")
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", torn)
            with pytest.raises(StoreError, match="no space left"):
                merger.save(tmp_path)
        assert torch.equal(merged_logits(TokenMerger.load(tmp_path, tiny), tiny, tokens), old)
    merger.save(tmp_path)
    assert TokenMerger.load(tmp_path, tiny).levels[0] == merger.levels[0]
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]) == 1


def sealed_anew(path, text: str) -> None:
    """As if it had been written so: else its digest alone would tell."""
    path.write_bytes(records.seal(re.sub("(?<=sha256:)[0-9a-f]{64}", "0" * 64, text).encode()))


def rewritten(old: str, new: str):
    return lambda record: sealed_anew(record, record.read_text().replace(old, new))


def without(key: str):
    return lambda record: sealed_anew(record, json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != key}))


DAMAGES = {
    "no record": ("*.json", lambda path: path.unlink()), "no weights": ("*.safetensors", lambda path: path.unlink()),
    "cut weights": ("*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:90])),
    "no JSON": ("*.json", lambda path: path.write_text("{")), "a list": ("*.json", lambda path: path.write_text("[]")),
    "newer": ("*.json", rewritten("merger 2", "merger 3")), "bad option": ("*.json", rewritten('"recent": 2', '"recent": -2')),
    "edited": ("*.json", lambda path: path.write_text(path.read_text().replace('"recent": 2', '"recent": 3'))),
    "other shape": ("*.json", rewritten('"projection": 6', '"projection": 5')),
    **{f"without {key}": ("*.json", without(key)) for key in ("base", "options", "files", "facts", "calibrated")},
}  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize(("which", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused(tiny, tmp_path, which, damage):
    make_merger(tiny, "projected").save(tmp_path)
    damage(next(tmp_path.glob(which)))
    with pytest.raises(StoreError, match="expected"):
        TokenMerger.load(tmp_path, tiny)


def test_saving_needs_a_model_and_a_folder(tiny, tmp_path):
    with pytest.raises(MergeError, match="prepare"):
        TokenMerger([0], threshold=0.5).save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose another"):
        make_merger(tiny, "leader").save(tmp_path / "file")


# -- options ---------------------------------------------------------------------------------------------------------------------------


BAD = [
    {"layers": []}, {"layers": [0, 0]}, {"layers": [-1]},
    {"threshold": None}, {"target_rate": 0.3}, {"threshold": math.nan}, {"threshold": "high"}, {"threshold": 0.1, "floor": 0.2},
    {"threshold": None, "target_rate": 0}, {"threshold": None, "target_rate": 1}, {"threshold": None, "target_bytes": -0.5},
    {"rule": "best"}, {"representative": "median"}, {"residual": "full"}, {"preserve": "length"}, {"preserve_share": 0}, {"preserve_share": 1.5},
    {"recent": 0}, {"recent": 2.5}, {"recent": "2"}, {"floor": 1.0}, {"floor": -2}, {"temperature": 0}, {"temperature": math.nan},
    {"attention_weight": -0.1}, {"attention_weight": 1.1}, {"projection": 0}, {"projection": 2.5}, {"residual_width": 0}, {"seed": -1},
    {"contrastive_weight": 0.5}, {"contrastive_weight": -1, "projection": 4}, {"contrastive_weight": 1.0, "projection": 4, "rule": "random"},
    {"margin": 2}, {"margin": math.nan}, {"residual": "gated", "representative": "mean"}, {"residual": "gated", "drop": True},
    {"simulate": True, "drop": True}, {"simulate": True, "residual": "gated"}, {"simulate": True, "attention_weight": 0.5},
    {"simulate": True, "rule": "bipartite"}, {"simulate": True, "threshold": None, "target_bytes": 0.5}, {"rule": "all"}, {"rule": "key_norm"},
    {"adaptive": True, "rule": "random"}, {"attention_weight": 0.5, "rule": "adjacent"}, {"progressive": True, "rule": "score"}, {"nonsense": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_options_are_refused(bad):
    options = {"layers": [0, 1], "threshold": 0.5} | bad
    with pytest.raises(MergeError, match=r"expected .*got"):
        TokenMerger(options.pop("layers"), **options)


# -- documentation ---------------------------------------------------------------------------------------------------------------------


DOCUMENTED = {
    "TokenMerger": (TokenMerger, ("Args:", "Raises:", "Source:", "Example:")), "attached": (TokenMerger.attached, ("Args:", "Raises:", "Example:")),
    "calibrate": (TokenMerger.calibrate, ("Args:", "Returns:", "Raises:", "Example:")), "save": (TokenMerger.save, ("Args:", "Returns:", "Raises:")),
    "load": (TokenMerger.load, ("Args:", "Returns:", "Raises:")), "streaming": (merging.streaming, ("Args:", "Returns:", "Raises:", "Example:")),
    "generate": (merging.generate, ("Args:", "Returns:", "Raises:", "Example:")), "Options": (merging.Options, ("Attributes:", "Raises:")),
}  # fmt: skip


@pytest.mark.parametrize(("thing", "parts"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_docstrings_have_their_parts(thing, parts):
    text = inspect.getdoc(thing)
    assert all(part in text for part in parts)
    for name in set(inspect.signature(thing).parameters) - {"self", "cls"}:
        assert f"{name}:" in text, name
