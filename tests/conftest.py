"""Tiny random models, a tokenizer made here, and run-time checks of shapes and types in basin_lens."""

import gc
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads beside another worker only wait for one another: up to ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.metadata import version
from typing import TYPE_CHECKING

from jaxtyping import install_import_hook

import tests.typechecks  # noqa: F401 - the hook finds it by name

# Shapes and types in signatures are checked in tests only; users pay nothing for them. CI checks them in its plain run: the other
# runs, which are of the same code, take a sixth less time without.
if os.environ.get("BASIN_LENS_TYPECHECKS", "1") != "0":
    _hook = install_import_hook("basin_lens", "tests.typechecks.outermost")
    _hook.__enter__()

import pytest

if TYPE_CHECKING:  # the process that only hands tests to others imports neither torch nor TransformerLens
    import torch

TINY = ("llama", "gpt2", "neox", "gemma2", "bloom")
PACKED = ("llama", "gpt2", "neox", "gemma2")
VOCAB = 211
MEASURED_ONCE = ("tests/studies/",)
# What takes minutes is begun first, so that no worker is alone with it at the end; each test for itself, wherever one is free.
LONG = ("tests/simulation/", "tests/files/test_death.py", "tests/real/", "tests/house/test_examples.py")
APART = ("tests/simulation/", "tests/house/test_examples.py")
TRAINED = Path(__file__).parent / "fixtures" / "trained"
# Laws marked `many` of which a case has been collected.
_LAWS = pytest.StashKey[set[tuple[str, tuple[str | None, ...]]]]()


def has_hooked_transformer() -> bool:
    """Whether this lane has TransformerLens 3.9's HookedTransformer."""
    return int(version("transformer-lens").split(".")[0]) < 4


hooked_lane = pytest.mark.skipif(not has_hooked_transformer(), reason="needs TransformerLens 3.9")


def make_hf(name: str, seed: int = 0, **changes):
    """A tiny random Hugging Face model: name in `TINY`."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        BloomConfig,
        Gemma2Config,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
    )

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    room = {"intermediate_size": 64, "max_position_embeddings": 64}
    # Wide initial weights: with the usual 0.02 the blocks would hardly move a state, and any route would look exact.
    wide = {"initializer_range": 0.2}
    config = {
        "llama": lambda: LlamaConfig(**shape | room | wide | {"num_key_value_heads": 2} | changes),
        "gpt2": lambda: GPT2Config(
            **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | wide | changes
        ),
        "neox": lambda: GPTNeoXConfig(**shape | room | wide | changes),
        "gemma2": lambda: Gemma2Config(
            **shape | room | wide | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6} | changes
        ),
        "bloom": lambda: BloomConfig(**{"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4} | wide | changes),
    }[name]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    return model


def make_tokenizer():
    """A byte-level BPE tokenizer trained on a few sentences here: real offsets, any text, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>")


TEXTS = [
    "The ferry had stopped running in October, and the lamp had a voice of its own.",
    "She climbed the ninety steps with her tea in a jar and sat down beside the glass.",
    "Heat a steel blade until it glows, then plunge it into cold water, and you have trapped it.",
    "The water allows no such time, so the carbon stays where it was, wedged in a crystal.",
    "The man about the piano came at four, and the clock was eleven minutes slow.",
    "Nobody reads the clock, said the boy, and the man took the piano away in the rain.",
]


def make_bridge(name: str, seed: int = 0, tokenizer=None, **changes):
    """A tiny random TransformerBridge: name in `TINY`. With a tokenizer, the vocabulary is widened to it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if tokenizer is not None:
        changes = {"vocab_size": len(tokenizer)} | changes
    model = make_hf(name, seed, **changes)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    # Set afterwards: TransformerLens would reload a tokenizer that it is given, from a folder that this one never had.
    bridge.tokenizer = tokenizer
    return bridge


def make_hooked(seed: int = 0, **changes):
    """A tiny random HookedTransformer (TransformerLens 3.9)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = {
        "n_layers": 3, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_mlp": 64, "d_vocab": VOCAB, "act_fn": "gelu",
        "positional_embedding_type": "rotary", "rotary_dim": 8, "normalization_type": "LN", "seed": seed, "device": "cpu",
        "initializer_range": 0.2,
    }  # fmt: skip
    return HookedTransformer(HookedTransformerConfig(**settings | changes)).eval()


def replace_in_all_rooms(monkeypatch, name: str, new) -> None:
    """Put something else in the place of a name of the model room, in every module outside that room that has imported it."""
    import basin_lens.cli.app
    import basin_lens.studies

    old = getattr(basin_lens.model, name)
    for path, module in list(sys.modules.items()):
        own = path.startswith("basin_lens.model.")
        if path.startswith("basin_lens") and not own and module.__dict__.get(name) is old:
            monkeypatch.setattr(module, name, new)


def random_tokens(batch: int = 6, length: int = 14, seed: int = 1) -> "torch.Tensor":
    """Random token ids that any tiny model takes."""
    import torch

    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A few named tests, and nothing else, run in this process: each worker would first import torch for ten seconds."""
    given = [str(name) for name in config.invocation_params.args]
    named = [name for name in given if "::" in name or name.endswith(".py")]
    return 0 if 0 < len(named) < 4 and not any(Path(name).is_dir() for name in given) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file at a time, and a room whole whose files share measurements that take longer than most files: they are made once,
    not in every worker. In the order of collection, see `pytest_collection_modifyitems`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(APART):
                return nodeid
            return next((room for room in MEASURED_ONCE if nodeid.startswith(room)), None) or super()._split_scope(nodeid)

    return Scheduling(config, log)


LEFT_OUT = {"real", "simulation", "slow", "browser", "damage", "death", "ray"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of a law marked `many`, the first case is quick, and every other is slow, in both lanes: `slow(everywhere=True)`.

    Cases that are left out for their own marks come first nowhere. Those that wait for one lane are counted apart: each lane keeps
    a quick one.
    """
    if item.get_closest_marker("many") is None or not LEFT_OUT.isdisjoint(mark.name for mark in item.iter_markers()):
        return
    waits = tuple(mark.kwargs.get("reason") for mark in item.iter_markers("skipif"))
    law = item.nodeid.split("[")[0], waits
    seen = item.session.stash.setdefault(_LAWS, set())
    if law in seen:
        item.add_marker(pytest.mark.slow(everywhere=True))
    seen.add(law)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing of what is imported and collected is garbage: looking for some is a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: what is known to be, then the room measured once, then files by their number of tests."""
    files = Counter(item.location[0] for item in items)

    def rank(item: pytest.Item) -> tuple[int, int, str]:
        path = item.location[0]
        if path.startswith(LONG):
            return next(place for place, start in enumerate(LONG) if path.startswith(start)), 0, path
        return len(LONG) + (not path.startswith(MEASURED_ONCE)), -files[path], path

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What is imported by now lives as long as the tests: who collects garbage need not walk through it, a third of a second each
    time."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama(tokenizer):
    """A tiny Llama with a tokenizer, shared: tests must leave it as they found it."""
    return make_bridge("llama", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def capture(llama):
    import basin_lens as bl

    return bl.Capture.from_texts(llama, TEXTS, progress=False)


@pytest.fixture(scope="session")
def trained():
    """A tiny trained GPT-2 with a tokenizer of its own (tests/fixtures/make_trained.py), shared: tests must leave it as they found it."""
    import basin_lens as bl

    return bl.load_model(TRAINED)


@pytest.fixture(scope="session")
def real_model():
    import basin_lens as bl

    return bl.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def stand_in(real_model):
    """Random, narrow, with the depth, heads and tokens of SmolLM2-135M: code written for it runs in a hundredth of the time."""
    import copy

    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    from basin_lens.model.identity import hf_config

    config = copy.deepcopy(hf_config(real_model))
    config.update({"hidden_size": 36, "head_dim": 4, "intermediate_size": 48, "initializer_range": 0.2})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=config)
    bridge.tokenizer = real_model.tokenizer
    return bridge


@pytest.fixture(autouse=True)
def _torch_as_found():
    """No test may leave gradients or the default type switched."""
    import torch

    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def chromium() -> str | None:
    """Path of a Chromium that can be driven, or None."""
    if shutil.which("chromedriver") is None:
        return None
    return shutil.which("chromium") or shutil.which("chromium-browser")
