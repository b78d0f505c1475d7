"""Tiny random models and texts, made here."""

import inspect
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

import basin_lens as bl
from basin_lens.texts import reference_passages

QUIET = {"progress": False}
Items = Iterator[tuple[str, Callable[[], Any]]]  # name of a result, and what computes it

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
ROOM = {"intermediate_size": 64, "max_position_embeddings": 64}
LLAMA = SHAPE | ROOM | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}),
    "neox": ("GPTNeoXConfig", SHAPE | ROOM),
    "gemma2": ("Gemma2Config", LLAMA | {"head_dim": 8, "sliding_window": 6}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}),
    "mistral": ("MistralConfig", LLAMA | {"head_dim": 8, "sliding_window": 6}),
}


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator([passage.text for passage in reference_passages()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>")


def hf_model(family: str, seed: int = 0, **changes: Any) -> Any:
    import transformers

    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**settings | {"vocab_size": len(tokenizer())} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    return model


@cache
def model_of(family: str, seed: int = 0, **changes: Any) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = hf_model(family, seed, **changes)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    bridge.tokenizer = tokenizer()
    return bridge


def texts(count: int, length: int = 500) -> list[bl.Passage]:
    """Built-in passages: the first four are two documents, the others one each; with spans, and labels of every kind."""
    made = []
    for i, passage in enumerate(reference_passages()[:count]):
        doc = i // 2 if i < 4 else i
        labels = {"even": doc % 2 == 0, "mood": ("glad", "sad")[doc % 2], "dose": float(doc % 4), "kind": str(passage.doc)}
        spans = {"opening": (0, 30), "middle": (30, 60)}
        made.append(bl.Passage(passage.text[:length], doc=f"text {doc}", labels=labels, spans=spans))
    return made


def mixed_texts(count: int, length: int, first: int = 0) -> list[bl.Passage]:
    """Words of the built-in passages in any order: none is a copy of another."""
    words = " ".join(passage.text for passage in reference_passages()[:6]).split()
    return [bl.Passage(" ".join(random.Random(i).choices(words, k=length)), doc=str(i)) for i in range(first, first + count)]


def token_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, len(tokenizer()), (batch, length), generator=torch.Generator().manual_seed(seed))


@cache
def capture_of(family: str, seed: int = 0) -> Any:
    return bl.Capture.from_texts(model_of(family, seed), texts(8, 110), max_length=40, **QUIET)


def either(room: Any, *names: str) -> Any:
    """What has one of these names: a name that the layout changes."""
    return next(getattr(room, name) for name in names if hasattr(room, name))


def option(function: Callable[..., Any], value: Any, *names: str) -> dict[str, Any]:
    """An argument under the name that it has in this tree."""
    return {next(name for name in names if name in inspect.signature(function).parameters): value}
