"""What the model would write: greedy and sampled continuations, with a key/value cache where the model keeps one."""

import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.errors import ModelError
from basin_lens.model.hooks import measuring
from basin_lens.model.identity import device_of, kind_of, n_context
from basin_lens.model.incremental_decoding import keeps_cache
from basin_lens.model.protocol import HookedModel


def continuations(
    model: HookedModel, prompts: Int[Tensor, "batch pos"], length: int, *, temperature: float = 0.0, seed: int = 0
) -> Int[Tensor, "batch length"]:
    """`length` tokens behind each prompt, the end-of-text token treated as any other.

    Args:
        model: a hooked model.
        prompts: token ids without padding, on any device.
        length: tokens to write.
        temperature: 0 for the most likely token each time (greedy); else of the softmax they are drawn from.
        seed: of the draw; the global random state stays as it was.

    Raises:
        ModelError: prompt and continuation are longer than the model's context.
    """
    if prompts.shape[1] + length > n_context(model):
        raise ModelError(
            f"expected prompt and continuation within the model's context of {n_context(model)} tokens, got "
            f"{prompts.shape[1]} + {length}. Ask for less."
        )
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    # torch.manual_seed would seed accelerators that a model on the CPU does not draw from.
    seeded = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    with measuring(model), torch.random.fork_rng(devices=devices):
        seeded(seed)
        begun = prompts.to(device)
        # From token ids, HookedTransformer takes the tokenizer's pad token (often the end of text) at an edge for padding.
        written = model.generate(
            model.embed(begun) if kind_of(model) == "hooked" else begun,
            max_new_tokens=length,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            stop_at_eos=False,
            use_past_kv_cache=keeps_cache(model),
            return_type="tokens",
            verbose=False,
        )
    assert isinstance(written, Tensor)
    return written[:, -length:].cpu()
