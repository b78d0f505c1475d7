"""A model that bears a caller's hooks computes what its weights do not say: its reference bank is its own, and is not kept."""

import pytest

import basin_lens as bl
from basin_lens import model as door
from basin_lens.analyzers import Compression
from tests.capture.caches import either
from tests.capture.readers import BOTH
from tests.conftest import TEXTS


def double(state, hook):
    return 2 * state if hook is not None else state


def scores(model):
    return bl.analyze(model, TEXTS, [Compression(k=5)], layers=[1], bank="reference", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["clean", "hooked"])
def test_the_reference_bank_of_a_hooked_model_is_its_own(llama, tmp_path, monkeypatch, first):
    """Whoever measures first, the other's numbers stay what they are alone."""
    alone = {}
    for kind in ("clean", "hooked"):
        monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / kind))
        with llama.hooks(fwd_hooks=[("blocks.0.hook_out", double)] if kind == "hooked" else []):
            alone[kind] = scores(llama).compression
    assert not alone["clean"].equals(alone["hooked"])
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "both"))
    for kind in (first, *{"clean", "hooked"} - {first}):
        with llama.hooks(fwd_hooks=[("blocks.0.hook_out", double)] if kind == "hooked" else []):
            assert scores(llama).compression.equals(alone[kind])
    assert len(list((tmp_path / "both" / "reference").iterdir())) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_hooks_are_in_provenance(kind):
    model = either(kind)
    model.tokenizer = None
    assert door.hooked_at(model) == []
    assert "hooks" not in door.provenance(model)
    model.add_hook("blocks.1.mlp.hook_out" if kind is None else "blocks.1.hook_mlp_out", double)
    (name,) = door.provenance(model)["hooks"]
    assert "blocks.1" in name
    model.reset_hooks()
    assert door.hooked_at(model) == []
