"""Neighbors -> their images under a block, in a stated context, exactly. See `maps` for the contexts.

A patched pass takes one of two routes that give the same numbers:

R2  packed: on a bridge, (query, neighbor) pairs are rows of one block call with frozen prefix keys and values, one block-token per
    pair; on a HookedTransformer, each pair is a token after its own left-padded prefix.
R1  block only: the block's recorded arguments on copies of the whole sequence with the state put in. Any block that can be
    called by itself; slower by about the length of the sequence.

R0, rerunning the model with a hook, is the oracle (`model.rerun_with_state`).
"""

from basin_lens.transport.affine import AffineFit, affine_fit
from basin_lens.transport.maps import CONTEXTS, BlockMap, Context, LayerMaps, solo_images
from basin_lens.transport.patched import PatchedBlock, chunk_places, query_chunks, rows_per_call
from basin_lens.transport.probe import Probe, why_not_packed
from basin_lens.transport.proof import Proof, check, prove

__all__ = [
    "CONTEXTS",
    "AffineFit",
    "BlockMap",
    "Context",
    "LayerMaps",
    "PatchedBlock",
    "Probe",
    "Proof",
    "affine_fit",
    "check",
    "chunk_places",
    "prove",
    "query_chunks",
    "rows_per_call",
    "solo_images",
    "why_not_packed",
]
