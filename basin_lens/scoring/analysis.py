"""A model and texts -> the table: from a request to a plan, from a plan to results, from results to a table."""

import warnings
from dataclasses import dataclass

import pandas as pd

from basin_lens import tables
from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture
from basin_lens.errors import BankWarning
from basin_lens.model import HookedModel, full_precision, source_of
from basin_lens.scoring.bank_overlap import warning
from basin_lens.scoring.conducting import conduct, found, kept_neighbors, values_at
from basin_lens.scoring.folder_run import FolderRequest, run_in_folder, takes_folder_request
from basin_lens.scoring.job import prepare
from basin_lens.scoring.memory_store import MemoryStore
from basin_lens.scoring.request import Request
from basin_lens.scoring.results import KeptNeighbors
from basin_lens.scoring.token_rows import row_facts
from basin_lens.texts import Texts


@takes_folder_request(Request, FolderRequest)
def analyze(model: HookedModel, data: Capture | Texts, request: FolderRequest) -> pd.DataFrame | tables.RunTable:
    """Measure every token of some texts at every layer of a model.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`, in any state.
        data: a text, a `Passage`, a path, a list of these, a table with a `text` column (`datasets`, pandas, Arrow), token ids
            (`[batch, pos]`, lists of their own lengths, what a tokenizer returns), or a `Capture`.
        analyzers: what to measure; None: `Compression` of 192 tokens per layer (a seeded sample; `Compression()` is of all),
            `Contraction`, `RawCompression`, `Neighborhood`, `Surprisal`, `StateNorm`.
        layers: block indices; None: all (of the capture).
        bank: where neighbors come from: None for the texts themselves, another `Capture`, or `"reference"` for the built-in
            passages (needed for a single text).
        queries: which tokens are scored: positions, a boolean mask `[rows]` or `[seqs, pos]`, a label or span name, or a number of
            tokens (a seeded sample); None: all. It does not shrink the bank.
        controls: add to each score on neighbors' images the same on random points (`<column>_random`) and on an equally tight set
            elsewhere, the neighbors of another token (`<column>_radius_matched`). Costs two more sets of images. `Compression` has
            its own nulls beside it.
        backend: how neighbors are searched; see `basin_lens.neighbors.find`. Only `"approximate"` is not exact: of texts that are
            cut (`shard_tokens`) each shard is searched by itself, with a recall of its own; provenance has the lowest of a layer.
        compile: run blocks through `torch.compile` (half a minute for the first; then they take about four fifths of the time).
            Scores agree to the block's check, not bit for bit. Where a block cannot be compiled, or does not pass the check then,
            it runs as it is, with a `CompileWarning`.
        seed: of every random choice.
        max_length, batch_size, prepend_bos, attention_mask: see `Capture.from_texts`.
        progress: show progress bars.
        out: a folder. The run is cut into pieces, each a file there; interrupted, the same call goes on where it was, and does anew
            what is damaged. Another run's folder is refused, unless `fresh`. What is returned is a `tables.RunTable`, of which
            parts are loaded. None: all stays in memory.
        engine: `"local"`, this process; `"ray"`: actors of a Ray cluster do the pieces (extra `ray`), see `engine_options`.
        engine_options: `workers` (actors; None: one for each core or GPU), `num_cpus` and `num_gpus` of each, `address` (None: that
            of `RAY_ADDRESS`, or a cluster on this machine for this call), `retries` of a piece whose actor died.
        fresh: delete what another run, or an earlier one, left in the folder.
        keep_states: leave the states in the folder; else they are deleted as soon as no layer is left that needs them.
        store_dtype: number format of the pieces' states on disk: `"float32"`, or `"bfloat16"`, `"float16"` (of a model that
            computes in it, nothing is lost; the block's check allows for it). What is laid out in the order of the rows for a layer
            that is cut is float32.
        piece_tokens: a piece of reading holds at least so many tokens.
        shard_tokens: where the texts have more tokens, the work at a layer is cut into shards of about so many: a piece then holds
            the states of one shard. Numbers are the same, bit for bit, with every backend but `"approximate"`, where provenance
            names the cut. In memory: 16,384.

    Returns:
        one row per (layer, token): `run, layer, passage, doc, seq, pos, token_id, token, start, end`, labels, `span`, then the
        analyzers' columns (units in `table.attrs["provenance"][run]["columns"]`). What an analyzer leaves out is NaN, counted by
        reason in the provenance. All texts are measured; which of them are copies of one another is in provenance too (`"copies"`),
        and statistics count each text once.

    Warns:
        BankWarning: over a quarter of the neighbors stand on the skeleton of their query's text (prompts of one template); the
            shares of every layer are in provenance (`"search"`: `"same_position"`, `"same_skeleton"`).
        CompileWarning: blocks are not compiled although `compile` asks for it; why is in provenance, by layer.

    Raises:
        BasinLensError: before any long work, if the model, the texts, the layers, the analyzers or the bank do not fit.
        TransportError: the block does not reproduce the captured states, or a route is not exact on this model.
        StoreError: a folder of another run, one that somebody else writes to, or a full disk.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", layers=[5], bank="reference", progress=False)
        >>> bool(table.compression.notna().any())
        True
    """
    return score(model, data, request).table if request.out is None else run_in_folder(model, data, request)


@dataclass(frozen=True)
class Analysis:
    """A table, and the neighbors behind one of its scores if they were to be kept."""

    table: pd.DataFrame
    neighbors: KeptNeighbors | None


@full_precision()
def score(
    model: HookedModel,
    data: Capture | Texts,
    request: Request,
    *,
    keep_neighbors_of: CloudAnalyzer | None = None,
    frozen: KeptNeighbors | None = None,
) -> Analysis:
    """`analyze`, and on request the neighbors of one of its analyzers.

    Args:
        model, data: as for `analyze`.
        request: the options of `analyze`.
        keep_neighbors_of: an instance among the request's analyzers.
        frozen: neighbors of another run on the same texts and layers, taken as they are.
    """
    job = prepare(model, data, request, keep=keep_neighbors_of, frozen=frozen)
    store = MemoryStore(job)
    conduct(job, store)
    facts = found(job, store)
    if job.run is not None and (said := warning(facts["search"]["same_skeleton"])) is not None:
        warnings.warn(said, BankWarning, stacklevel=4)
    facts["made"] = tables.made_now(source_of(model))
    rows, labels = row_facts(job.capture)
    table = tables.build(rows, labels, job.plan.layers, values_at(job, store, job.plan.layers), tables.Provenance.from_json(facts))
    return Analysis(table, kept_neighbors(job, store))
