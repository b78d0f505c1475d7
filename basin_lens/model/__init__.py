"""The only door to TransformerLens: loading, hook names, special tokens, block calls, fingerprints.

Nothing outside this folder spells a hook name, a block attribute, a special-token rule or a TransformerLens
import. Model classes are told apart by duck typing, never by importing them: TransformerLens 4 has no
`HookedTransformer`, and asking it for one raises.
"""

from basin_lens.model.blocks import (
    BlockCall,
    FrozenPrefix,
    PaddedPrefix,
    call_block,
    entering,
    feed_forward,
    final_norm,
    is_cache_slot,
    keys_and_values,
    logits_of,
    record_calls,
    rerun_to_logits,
    rerun_with_state,
)
from basin_lens.model.checkpoints import copy_of, put_tuned, save_tuned, tuned_facts
from basin_lens.model.compiled import CompiledBlock
from basin_lens.model.generation import continuations
from basin_lens.model.hooks import (
    cache_entry,
    forward_pass,
    measuring,
    missing_points,
    pass_until,
    point_name,
    reading,
)
from basin_lens.model.identity import (
    check_model,
    device_of,
    fingerprint,
    full_name,
    has_absolute_positions,
    hooked_at,
    kind_of,
    n_context,
    n_layers,
    needed_tokenizer,
    padding_of,
    parameters_of,
    provenance,
    remember_name,
    source_of,
    tokenizer_fingerprint,
    tokenizer_of,
    uses_bos,
    vocabulary_size,
    width,
)
from basin_lens.model.incremental_decoding import Stepper, cache_bytes, end_tokens, start_token, stepping, thread_count
from basin_lens.model.kept import Kept, cache_folder, kept_models, remove
from basin_lens.model.knockout import knocked_out
from basin_lens.model.kv_rows import RowStore, kv_shape, obeys_pattern, own_rows, query_width
from basin_lens.model.loading import EMBEDDED_NAME, embedded_file, load_model
from basin_lens.model.memory import Memory, counting_memory
from basin_lens.model.numerics import full_precision
from basin_lens.model.protocol import HookedModel, StateCache, Tokenizer
from basin_lens.model.random_init import in_dtype, random_twin
from basin_lens.model.rope import check_lengths, one_side
from basin_lens.model.shorter_passes import Prefixes, pass_from
from basin_lens.model.weights import output_weight

__all__ = [
    "EMBEDDED_NAME",
    "BlockCall",
    "CompiledBlock",
    "FrozenPrefix",
    "HookedModel",
    "Kept",
    "Memory",
    "PaddedPrefix",
    "Prefixes",
    "RowStore",
    "StateCache",
    "Stepper",
    "Tokenizer",
    "cache_bytes",
    "cache_entry",
    "cache_folder",
    "call_block",
    "check_lengths",
    "check_model",
    "continuations",
    "copy_of",
    "counting_memory",
    "device_of",
    "embedded_file",
    "end_tokens",
    "entering",
    "feed_forward",
    "final_norm",
    "fingerprint",
    "forward_pass",
    "full_name",
    "full_precision",
    "has_absolute_positions",
    "hooked_at",
    "in_dtype",
    "is_cache_slot",
    "kept_models",
    "keys_and_values",
    "kind_of",
    "knocked_out",
    "kv_shape",
    "load_model",
    "logits_of",
    "measuring",
    "missing_points",
    "n_context",
    "n_layers",
    "needed_tokenizer",
    "obeys_pattern",
    "one_side",
    "output_weight",
    "own_rows",
    "padding_of",
    "parameters_of",
    "pass_from",
    "pass_until",
    "point_name",
    "provenance",
    "put_tuned",
    "query_width",
    "random_twin",
    "reading",
    "record_calls",
    "remember_name",
    "remove",
    "rerun_to_logits",
    "rerun_with_state",
    "save_tuned",
    "source_of",
    "start_token",
    "stepping",
    "thread_count",
    "tokenizer_fingerprint",
    "tokenizer_of",
    "tuned_facts",
    "uses_bos",
    "vocabulary_size",
    "width",
]
