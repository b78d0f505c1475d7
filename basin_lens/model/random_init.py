"""Copies of a model to compare it with: its random twin, which has learned nothing, and itself in another number format."""

import copy
from typing import Any

import torch

from basin_lens.errors import ModelError
from basin_lens.model.checkpoints import copy_of
from basin_lens.model.identity import check_model, device_of, full_name, hf_config, kind_of, remember_name, weight_processing
from basin_lens.model.protocol import HookedModel
from basin_lens.values import whole_numbers


@whole_numbers(ModelError)
def random_twin(model: HookedModel, *, seed: int = 0) -> HookedModel:
    """The same architecture, settings, tokenizer, dtype and device, with freshly initialized weights.

    What a score says of the twin, it says of the architecture and of the tokens, not of what was learned. Weights are drawn on
    the CPU by the architecture's own initialization, so that a seed gives the same twin on any device; the global random state
    stays as it was. Hooks on the model are not on the twin. A twin of a model with processed weights is processed too.
    The spread of the weights is the settings' `initializer_range`; a GGUF file does not hold it, so there it is the architecture's
    default (0.02 for the embedded model, which was itself begun with 0.042).

    Args:
        model: a `TransformerBridge` (over a Hugging Face model, or native) or `HookedTransformer`; it is not changed.
        seed: of the weights.

    Returns:
        a model of the same class in eval mode; provenance names it `random twin of ..., seed 0`.

    Raises:
        ModelError: the architecture cannot be built from its settings alone.

    Example:
        >>> import basin_lens as bl
        >>> twin = bl.controls.random_twin(bl.load_model(), seed=0)
        >>> twin.cfg.n_layers
        30
    """
    check_model(model)
    dtype = next(model.parameters()).dtype
    try:
        # Without inference_mode(False), a caller's inference mode would make weights that no gradient can pass; without the device,
        # a caller's default device would draw them.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
            build = _hooked if kind_of(model) == "hooked" else _native if hf_config(model) is None else _from_settings
            twin = build(model, dtype, seed).eval()
    except Exception as error:  # transformers and TransformerLens raise anything, down to AttributeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"expected a model that can be built from its settings alone, got {full_name(model)}: {reason} "
            "Build the random model yourself: every other function takes it."
        ) from error
    twin.tokenizer = getattr(model, "tokenizer", None)
    for name in ("default_prepend_bos", "tokenizer_prepends_bos", "tokenizer_appends_eos", "default_padding_side", "n_ctx"):
        if hasattr(model.cfg, name):
            setattr(twin.cfg, name, getattr(model.cfg, name))
    if kind_of(model) == "bridge" and getattr(model, "compatibility_mode", False):
        folded = weight_processing(model)["layer_norm_folded"]
        bridge: Any = twin
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    same = {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in twin.named_parameters()}
    if not same or weight_processing(twin) != weight_processing(model):
        raise ModelError(
            f"expected to rebuild {full_name(model)} from its settings, got other parameters or other weight processing "
            f"({weight_processing(twin)}). The model was changed after it was made: build the random model yourself."
        )
    remember_name(twin, f"random twin of {full_name(model)}, seed {seed}")
    return twin


def in_dtype(model: HookedModel, dtype: torch.dtype) -> HookedModel:
    """A copy of the model in another number format; the model stays as it is. Twice the memory.

    Args:
        model: a hooked model.
        dtype: such as `torch.bfloat16`.

    Returns:
        a model of the same class in eval mode; provenance names it `... in bfloat16`.

    Raises:
        ModelError: a model that cannot be copied.

    Example:
        >>> import torch
        >>> import basin_lens as bl
        >>> from basin_lens.model import in_dtype
        >>> next(in_dtype(bl.load_model(), torch.bfloat16).parameters()).dtype
        torch.bfloat16
    """
    made = copy_of(model, dtype)
    if hasattr(made.cfg, "dtype"):
        made.cfg.dtype = dtype
    remember_name(made, f"{full_name(model)} in {str(dtype).removeprefix('torch.')}")
    return made.eval()


def _from_settings(model: HookedModel, dtype: torch.dtype, _seed: int) -> HookedModel:
    """A bridge over a Hugging Face model."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(hf_config(model))
    assert config is not None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it says how weights were stored, and there are none yet
    weights = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    device, name = device_of(model), str(model.cfg.model_name)
    held = weights.to(device).eval()
    kind = type(weights).__name__
    return build_bridge_from_module(held, kind, hf_config=config, dtype=dtype, device=device, model_name=name)


def _native(model: HookedModel, dtype: torch.dtype, seed: int) -> HookedModel:
    """A bridge over one of TransformerLens's own models."""
    from transformer_lens.model_bridge import TransformerBridge

    config = copy.deepcopy(model.cfg)
    config.seed, config.init_weights = seed, True
    bridge: Any = TransformerBridge  # 4.3 attaches its ways of booting later, where no type checker looks
    return bridge.boot_native(config, device=device_of(model), dtype=dtype, model_name=str(model.cfg.model_name))


def _hooked(model: HookedModel, _dtype: torch.dtype, seed: int) -> HookedModel:
    """A HookedTransformer (3.9)."""
    from transformer_lens import HookedTransformer

    config = copy.deepcopy(model.cfg)
    held = config.tokenizer_name
    # No tokenizer by name: it would be fetched. No seed while building: it would seed Python, NumPy and the accelerators as well.
    config.tokenizer_name, config.seed, config.init_weights, config.device = None, None, True, "cpu"
    twin = HookedTransformer(config, move_to_device=False)
    twin.cfg.tokenizer_name, twin.cfg.seed, twin.cfg.device = held, seed, model.cfg.device
    return twin.to(device_of(model))
