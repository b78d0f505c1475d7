"""Tiny random models of every decoder family, and the README's table of which route serves which.

    python -m tests.families            # prints the table as this environment's TransformerLens gives it

`tests/transport/test_contract.py` runs over the list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tests.conftest import VOCAB, has_hooked_transformer, make_hooked, random_tokens

LENGTHS = (14, 14, 9, 14, 5, 12)  # a batch of unequal lengths; the longest are beyond the windows of 6


@dataclass(frozen=True)
class Family:
    """A family of models: how TransformerLens holds it, what is special about it, and a tiny one."""

    name: str
    kind: str  # "bridge", "native" or "hooked"
    special: str
    make: Callable[[], Any]


def bridge(config: str, **settings) -> Callable[[], Any]:
    def make():
        import transformers
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        torch.manual_seed(0)
        auto = transformers.AutoModelForSeq2SeqLM if config == "T5Config" else transformers.AutoModelForCausalLM
        model = auto.from_config(getattr(transformers, config)(**settings)).eval()
        model.set_attn_implementation("eager")
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    return make


def native(**settings) -> Callable[[], Any]:
    def make():
        from transformer_lens.model_bridge import TransformerBridge

        shape = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_head": 8, "n_ctx": 64, "d_vocab": VOCAB, "seed": 0}
        return TransformerBridge.boot_native(shape | settings).eval()

    return make


# Wide initial weights: with the usual 0.02 the blocks would hardly move a state, and any route would look exact.
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
ROOM = {"intermediate_size": 64, "max_position_embeddings": 64}
LLAMA = SHAPE | ROOM | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}

FAMILIES = (
    Family("Llama, SmolLM2", "bridge", "rotary, grouped-query", bridge("LlamaConfig", **LLAMA)),
    Family("Mistral", "bridge", "rotary, sliding window", bridge("MistralConfig", **LLAMA, sliding_window=6, head_dim=8)),
    Family("Qwen2", "bridge", "rotary, biases", bridge("Qwen2Config", **LLAMA)),
    Family("Qwen3", "bridge", "rotary, query/key norm", bridge("Qwen3Config", **LLAMA, head_dim=8)),
    Family("Gemma", "bridge", "rotary", bridge("GemmaConfig", **LLAMA, head_dim=8)),
    Family("Gemma 2", "bridge", "post-norms, soft caps, alternating window",
           bridge("Gemma2Config", **LLAMA, head_dim=8, sliding_window=6)),
    Family("Gemma 3 text", "bridge", "query/key norm, two rotary tables, alternating window",
           bridge("Gemma3TextConfig", **LLAMA, head_dim=8, sliding_window=6,
                  layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    Family("Phi", "bridge", "rotary, parallel", bridge("PhiConfig", **SHAPE, **ROOM)),
    Family("Phi-3", "bridge", "rotary", bridge("Phi3Config", **LLAMA, pad_token_id=0)),
    Family("OLMo", "bridge", "rotary", bridge("OlmoConfig", **LLAMA)),
    Family("OLMo 2", "bridge", "post-norms only, query/key norm", bridge("Olmo2Config", **LLAMA)),
    Family("OLMo 3", "bridge", "post-norms only, sliding window", bridge("Olmo3Config", **LLAMA, sliding_window=6)),
    Family("SmolLM3", "bridge", "rotary in some layers only", bridge("SmolLM3Config", **LLAMA, pad_token_id=0)),
    Family("StableLM", "bridge", "partly rotary", bridge("StableLmConfig", **LLAMA)),
    Family("StarCoder2", "bridge", "rotary, biases", bridge("Starcoder2Config", **LLAMA)),
    Family("Granite", "bridge", "scaled residuals", bridge("GraniteConfig", **LLAMA, residual_multiplier=0.5)),
    Family("Cohere", "bridge", "rotary, parallel", bridge("CohereConfig", **LLAMA)),
    Family("Mixtral", "bridge", "mixture of experts",
           bridge("MixtralConfig", **LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    Family("Qwen2-MoE", "bridge", "mixture of experts, shared expert",
           bridge("Qwen2MoeConfig", **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                  shared_expert_intermediate_size=32)),
    Family("GPT-OSS", "bridge", "mixture of experts, attention sinks, window",
           bridge("GptOssConfig", **LLAMA, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2)),
    Family("GPT-2", "bridge", "learned positions", bridge("GPT2Config", **GPT2)),
    Family("GPT-BigCode", "bridge", "learned positions, multi-query", bridge("GPTBigCodeConfig", **GPT2)),
    Family("GPT-Neo", "bridge", "learned positions, local attention in every other layer",
           bridge("GPTNeoConfig", vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, max_position_embeddings=256,
                  attention_types=[[["global", "local"], 2]], window_size=6, initializer_range=0.2)),
    Family("GPT-J", "bridge", "rotary, parallel", bridge("GPTJConfig", **GPT2, rotary_dim=4)),
    Family("GPT-NeoX, Pythia", "bridge", "rotary, parallel", bridge("GPTNeoXConfig", **SHAPE, **ROOM)),
    Family("OPT", "bridge", "learned positions",
           bridge("OPTConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
                  max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2)),
    Family("XGLM", "bridge", "sinusoidal positions",
           bridge("XGLMConfig", vocab_size=VOCAB, d_model=32, num_layers=3, attention_heads=4, ffn_dim=64,
                  max_position_embeddings=64, init_std=0.2)),
    Family("Bloom", "bridge", "alibi",
           bridge("BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2)),
    Family("MPT", "bridge", "alibi",
           bridge("MptConfig", vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=64, initializer_range=0.2)),
    Family("Falcon", "bridge", "alibi, parallel, multi-query",
           bridge("FalconConfig", **SHAPE, alibi=True, new_decoder_architecture=False, multi_query=True, parallel_attn=True)),
    Family("Mamba", "bridge", "state space",
           bridge("MambaConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=4)),
    Family("T5", "bridge", "encoder-decoder",
           bridge("T5Config", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
    Family("native", "native", "TransformerLens's own bridge", native(d_mlp=64, act_fn="gelu", normalization_type="LN")),
    Family("native, rotary", "native", "TransformerLens's own bridge",
           native(d_mlp=64, act_fn="gelu", normalization_type="LN", positional_embedding_type="rotary", rotary_dim=8)),
    Family("learned positions", "hooked", "GPT-2", lambda: make_hooked(positional_embedding_type="standard")),
    Family("rotary", "hooked", "partly rotary", lambda: make_hooked(positional_embedding_type="rotary", rotary_dim=4)),
    Family("rotary, grouped-query", "hooked", "Llama",
           lambda: make_hooked(normalization_type="RMS", n_key_value_heads=2, gated_mlp=True, act_fn="silu")),
    Family("rotary, parallel", "hooked", "Pythia", lambda: make_hooked(parallel_attn_mlp=True)),
    Family("local attention", "hooked", "GPT-Neo, Mistral",
           lambda: make_hooked(positional_embedding_type="standard", use_local_attn=True, window_size=6,
                               attn_types=["global", "local", "global"])),
    Family("alibi", "hooked", "Bloom", lambda: make_hooked(positional_embedding_type="alibi")),
    Family("shortformer positions", "hooked", "positions enter attention only",
           lambda: make_hooked(positional_embedding_type="shortformer")),
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What a family's model got: the routes by layer, whether `attn` and `mlp` are defined, or why it is refused."""

    routes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    halves: bool = False
    refused: str = ""


@cache
def model_of(name: str, kind: str) -> Any:
    return next(f for f in FAMILIES if (f.name, f.kind) == (name, kind)).make()


@cache
def capture_of(name: str, kind: str) -> Any:
    """A capture of unequal lengths, through the user's own cache."""
    import basin_lens as bl

    model = model_of(name, kind)
    tokens = random_tokens(len(LENGTHS), max(LENGTHS))
    bl.Capture.plan(model, tokens)  # what is refused is refused here, before the model runs
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    _, held = model.run_with_cache(tokens)
    return bl.Capture.from_cache(model, tokens, held, attention_mask=mask)


@cache
def served(name: str, kind: str) -> Served:
    """Try everything on the family's tiny model."""
    from basin_lens.errors import BasinLensError
    from basin_lens.transport import LayerMaps, Probe

    try:
        model, capture = model_of(name, kind), capture_of(name, kind)
        probe = Probe(model, int(capture.lengths.max()))
        maps = [LayerMaps(model, capture, capture, (probe, probe), layer) for layer in capture.layers]
        routes = tuple(m.block(m.layer).route for m in maps)
    except BasinLensError as error:
        return Served(refused=str(error))
    halves = True
    try:
        for m in maps:
            m.map("mlp")
    except BasinLensError:
        halves = False
    return Served(routes, tuple(m.reasons.get(m.layer, "") for m in maps), halves)


def families(*kinds: str) -> list[Family]:
    """The families that this environment's TransformerLens can make, of some kinds."""
    return [
        f
        for f in FAMILIES
        if f.kind in (kinds or ("bridge", "native", "hooked")) and (f.kind != "hooked" or has_hooked_transformer())
    ]


def table(*kinds: str) -> str:
    """Markdown: one line per family."""
    lines = ["| family | what is special | route | `attn`, `mlp` |", "| --- | --- | --- | --- |"]
    for f in families(*kinds):
        got = served(f.name, f.kind)
        route = "refused" if got.refused else " / ".join(dict.fromkeys(got.routes))
        halves = "" if got.refused else "yes" if got.halves else "no"
        lines.append(f"| {f.name} | {f.special} | {route} | {halves} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table("bridge", "native"))
    if has_hooked_transformer():
        print("\n" + table("hooked"))
