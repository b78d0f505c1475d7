"""What a model is: its kind, its sizes, its tokenizer, and a fingerprint of the function it computes."""

import hashlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from basin_lens.errors import ModelError
from basin_lens.model.protocol import HookedModel, PretrainedConfig, Tokenizer
from basin_lens.model.state_dicts import unused_facts
from basin_lens.values import Facts

# Settings that say where a model came from or how it is run, not what it computes.
_NAMES = ("_name_or_path", "model_name", "tokenizer_name", "architectures", "transformers_version")
_PLACE = ("torch_dtype", "device", "n_devices", "seed", "init_weights")
_RUN = ("_attn_implementation", "attn_implementation", "use_cache", "use_attn_result", "use_hook_tokens")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_NOT_THE_FUNCTION = frozenset((*_NAMES, *_PLACE, *_RUN, *_OUTPUTS))

# Tables that a model computes from its settings: another device may round their last digit otherwise, so a summary is hashed.
_COMPUTED = ("inv_freq", "rotary_sin", "rotary_cos", "embed_positions", "embed_positions.weights")
# Tables that grow, or change, as texts are read: not part of what the model is.
_CHANGING = ("cos_cached", "sin_cached", "alibi")

_full_names: "WeakKeyDictionary[HookedModel, str]" = WeakKeyDictionary()
_sources: "WeakKeyDictionary[HookedModel, dict[str, str]]" = WeakKeyDictionary()
_fingerprints: "WeakKeyDictionary[HookedModel, tuple[object, str]]" = WeakKeyDictionary()


def kind_of(model: HookedModel) -> Literal["bridge", "hooked"]:
    """`"bridge"` for a TransformerBridge, `"hooked"` for a HookedTransformer (TransformerLens 3.9).

    Raises:
        ModelError: the object is neither.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in names:
        return "bridge"
    if "HookedTransformer" in names:
        return "hooked"
    raise ModelError(
        f"expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}. "
        "Load one with basin_lens.load_model(...) or TransformerBridge.boot_transformers(...)."
    )


def check_model(model: HookedModel) -> None:
    """Refuse, with the reason, a model that is not a decoder made of attention blocks.

    Raises:
        ModelError: encoder-decoder, bidirectional, state-space or recurrent models, and other objects.
    """
    kind = kind_of(model)
    config = hf_config(model)
    if getattr(config, "is_encoder_decoder", False) or hasattr(model, "decoder_blocks"):
        raise ModelError(
            "expected a decoder-only language model, got an encoder-decoder: its blocks also read the encoder, so "
            "a state's path through one block is not defined here. Use a decoder-only model."
        )
    # TransformerLens 3.9 calls a BERT causal; transformers knows that it cannot generate.
    can_generate = getattr(getattr(model, "original_model", None), "can_generate", None)
    generates = can_generate is None or can_generate()
    if not hasattr(model, "blocks") or getattr(model.cfg, "attention_dir", "causal") != "causal" or not generates:
        raise ModelError(
            f"expected a causal decoder with a list of blocks, got {type(model).__name__} "
            f"({getattr(model.cfg, 'architecture', None) or getattr(model.cfg, 'original_architecture', None)}). "
            "Use a decoder-only language model."
        )
    for layer, block in enumerate(model.blocks):
        members = getattr(block, "submodules", None) if kind == "bridge" else dict(block.named_children())
        if "attn" not in (members or {}):
            raise ModelError(
                f"expected attention in every block, got block {layer} with {sorted(members or {})}: state-space, linear "
                "or recurrent blocks carry a state along the sequence that cannot be swapped for one token. Use a decoder-only "
                "transformer."
            )


def hf_config(model: HookedModel) -> PretrainedConfig | None:
    """The Hugging Face configuration under a bridge, or None."""
    return getattr(getattr(model, "original_model", None), "config", None)


def n_layers(model: HookedModel) -> int:
    """Number of blocks."""
    return len(model.blocks)


def width(model: HookedModel) -> int:
    """Width of the residual stream (`d_model`)."""
    return int(model.cfg.d_model)


def n_context(model: HookedModel) -> int:
    """Longest sequence that the model takes, in tokens."""
    return int(model.cfg.n_ctx)


def vocabulary_size(model: HookedModel) -> int:
    """Number of token ids that the model's embedding takes."""
    return int(model.cfg.d_vocab)


def has_absolute_positions(model: HookedModel) -> bool:
    """Whether the state that enters block 0 depends on the token's position, beside the token's id."""
    return str(getattr(model.cfg, "positional_embedding_type", "standard")) not in {
        "rotary",
        "alibi",
        "relative_positional_bias",
        "none",
    }


def device_of(model: HookedModel | nn.Module) -> torch.device:
    """Device on which the model computes."""
    return next(model.parameters()).device


def tokenizer_of(model: HookedModel) -> Tokenizer | None:
    """The model's tokenizer, or None."""
    return getattr(model, "tokenizer", None)


def needed_tokenizer(model: HookedModel) -> Tokenizer:
    """The same where nothing can be done without.

    Raises:
        ModelError: a model without one.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ModelError(f"expected a model with its tokenizer, got {full_name(model)} without one. Set model.tokenizer.")
    return tokenizer


def tokenizer_fingerprint(model: HookedModel) -> str:
    """Hash of the tokenizer's vocabulary, merges and rules; not of its name, nor of the padding that a call left behind.

    Returns:
        32 hexadecimal digits.

    Raises:
        ModelError: the model has no fast tokenizer.
    """
    backend = getattr(tokenizer_of(model), "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "expected a model with a fast tokenizer (one from the tokenizers library), got one without. Set model.tokenizer."
        )
    rules = json.loads(backend.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return hashlib.blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()


def uses_bos(model: HookedModel, prepend_bos: bool | None) -> int | None:
    """Id of the token to put before each sequence, or None for no such token.

    Args:
        model: a hooked model.
        prepend_bos: yes, no, or None for the model's own default (`cfg.default_prepend_bos`).
    """
    wanted = bool(getattr(model.cfg, "default_prepend_bos", True)) if prepend_bos is None else prepend_bos
    if not wanted:
        return None
    tokenizer = tokenizer_of(model)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None and prepend_bos:
        raise ModelError("expected a tokenizer with a BOS token, got one without. Pass prepend_bos=False.")
    return bos


def padding_of(model: HookedModel) -> tuple[int, bool, bool] | None:
    """Id of the token that the tokenizer pads with, and whether it is BOS, and EOS, too; None: no such token."""
    tokenizer = tokenizer_of(model)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return None
    return pad, pad == getattr(tokenizer, "bos_token_id", None), pad == getattr(tokenizer, "eos_token_id", None)


def remember_name(model: HookedModel, name: str, source: dict[str, str] | None = None) -> None:
    """Keep the full name under which `load_model` found the weights, and what it was asked for."""
    _full_names[model] = name
    if source is not None:
        _sources[model] = source


def source_of(model: HookedModel) -> dict[str, str] | None:
    """What `load_model` was asked for (`name_or_path`, `kind`), or None for a model that was made otherwise."""
    return _sources.get(model)


def parameters_of(model: HookedModel) -> dict[str, nn.Parameter]:
    """The parameters of the function that the model computes, each once, by name."""
    return dict(_parameters(model))


def full_name(model: HookedModel) -> str:
    """Name of the weights, in full."""
    return _full_names.get(model) or str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def weight_processing(model: HookedModel) -> Facts:
    """What TransformerLens did to the weights: this changes residual variances, so runs must not mix it."""
    normalization = str(getattr(model.cfg, "normalization_type", None))
    return {
        "compatibility_mode": bool(getattr(model, "compatibility_mode", False)),
        "layer_norm_folded": bool(getattr(model.cfg, "layer_norm_folding", False)) or normalization in {"LNPre", "RMSPre"},
        "normalization": normalization,
    }


def fingerprint(model: HookedModel) -> str:
    """Hash of the function that the model computes: parameters and buffers as used, settings, weight processing.

    Buffers too, because quantized weights are held as buffers. Costs about a second per gigabyte of weights; kept until a parameter
    or buffer is replaced or changed. Positional tables that the model computes from its settings are hashed to five digits, so that
    the last digit of another device's sine does not make another model; tables that change while texts are read (a dynamic rotary
    table) are not.

    Returns:
        32 hexadecimal digits.
    """
    parameters, buffers = dict(_parameters(model)), _buffers(model)
    processing = weight_processing(model)
    held = parameters | buffers
    state = (tuple((name, *_mark(value)) for name, value in held.items()), json.dumps(processing))
    known = _fingerprints.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([kind_of(model), processing, _settings(model)], sort_keys=True, default=str).encode())
    for name in sorted(held):
        value = held[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if name in buffers and name.endswith(_COMPUTED):
            digest.update(_summary(value).encode())
        else:
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    _fingerprints[model] = (state, digest.hexdigest())
    return digest.hexdigest()


def hooked_at(model: HookedModel) -> list[str]:
    """Hook points that bear a caller's hooks: such a model may compute something else than its weights, and its fingerprint, say.

    Hooks of torch itself (`register_forward_hook`) are not seen: they may do no more than count or time.
    """
    found = {id(point): name for name, point in model.hook_dict.items() if getattr(point, "fwd_hooks", None)}
    return sorted(found.values())


def provenance(model: HookedModel) -> Facts:
    """Plain facts about the model for a table's provenance."""
    return {
        "name": full_name(model),
        "fingerprint": fingerprint(model),
        "kind": kind_of(model),
        "architecture": getattr(model.cfg, "architecture", None) or getattr(model.cfg, "original_architecture", None),
        "layers": n_layers(model),
        "width": width(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(device_of(model)),
        "weight_processing": weight_processing(model),
        "versions": {name: version(name) for name in ("torch", "transformer-lens", "transformers")},
        **unused_facts(model),
        **({"hooks": hooks} if (hooks := hooked_at(model)) else {}),
    }


def _mark(parameter: torch.Tensor) -> tuple[int, int, int]:
    """What shows that a parameter is still the same: its place, its version, and sums along every axis.

    Sums too, because writing through `.data` keeps the version; along every axis, because swapped neurons keep the total.
    """
    held = parameter.detach()
    version = 0 if parameter.is_inference() else parameter._version
    if held.dtype == torch.bool or not held.numel():  # masks, as large as the context squared
        return held.data_ptr(), version, 0
    wide = torch.promote_types(held.dtype, torch.float32)
    others = [[d for d in range(held.ndim) if d != axis] for axis in range(held.ndim)]
    sums = [held.sum(axes, dtype=wide) if axes else held.to(wide) for axes in others or [[]]]
    return held.data_ptr(), version, hash(tuple(s.cpu().numpy().tobytes() for s in sums))


def _parameters(model: HookedModel) -> Iterator[tuple[str, nn.Parameter]]:
    inner = getattr(model, "original_model", None)
    return (model if inner is None else inner).named_parameters()


def _buffers(model: HookedModel) -> dict[str, torch.Tensor]:
    """Buffers that belong to the function, persistent or not, each once; without those that change as texts are read."""
    inner = getattr(model, "original_model", None)
    root: HookedModel | nn.Module = model if inner is None else inner
    # Of a rotary table that depends on length, the original one counts.
    switching = {f"{name}." for name, module in root.named_modules() if re.search("dynamic|longrope", _rope_type(module))}
    return {
        name: value
        for name, value in root.named_buffers()
        if not name.endswith(_CHANGING)
        and not (name[: name.rfind(".") + 1] in switching and name.endswith("inv_freq") and not name.endswith("original_inv_freq"))
    }


def _rope_type(module: nn.Module) -> str:
    return str(vars(module).get("rope_type", ""))


def _summary(table: torch.Tensor) -> str:
    """A table of positions, to five digits: what rises, what falls, how much, and where."""
    flat = table.reshape(-1).double()
    place = torch.arange(1, len(flat) + 1, dtype=torch.float64, device="cpu")
    sums = flat.clamp_min(0).sum(), flat.clamp_max(0).sum(), flat.square().sum(), (flat.abs() * place).sum()
    return " ".join(f"{float(value):.4e}" for value in sums)


def _settings(model: HookedModel) -> Facts:
    to_dict = getattr(hf_config(model), "to_dict", None)
    settings = dict(vars(model.cfg)) if to_dict is None else to_dict()
    if isinstance(quantized := settings.get("quantization_config"), dict):
        # The name of a GGUF file: renamed, it holds the same model.
        settings = settings | {"quantization_config": {name: value for name, value in quantized.items() if name != "gguf_file"}}
    return {name: value for name, value in settings.items() if name not in _NOT_THE_FUNCTION}
