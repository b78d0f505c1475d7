"""A model and texts -> the table: from a request to a plan, from a plan to results, from results to a table."""

import warnings
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from basin_lens import tables
from basin_lens.analyzers import CloudAnalyzer
from basin_lens.capture import Capture, check_cache, check_layers, fill_columns, layers_asked, read_states
from basin_lens.capture.batches import check_points
from basin_lens.errors import BankWarning, CaptureError
from basin_lens.model import HookedModel, check_model, full_precision, measuring, n_layers, source_of
from basin_lens.scoring.bank import choose_bank
from basin_lens.scoring.bank_overlap import warning
from basin_lens.scoring.plan import Plan
from basin_lens.scoring.request import Request, takes_request
from basin_lens.scoring.results import KeptNeighbors, LayerNeighbors, Results, provenance
from basin_lens.scoring.run import Run
from basin_lens.scoring.token_rows import query_rows, row_facts
from basin_lens.texts import Texts
from basin_lens.values import hides_bars


@takes_request(Request)
def analyze(model: HookedModel, data: Capture | Texts, request: Request) -> pd.DataFrame:
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
        backend: how neighbors are searched; see `basin_lens.neighbors.find`. Only `"approximate"` is not exact.
        seed: of every random choice.
        max_length, batch_size, prepend_bos, attention_mask: see `Capture.from_texts`.
        progress: show progress bars.

    Returns:
        one row per (layer, token): `run, layer, passage, doc, seq, pos, token_id, token, start, end`, labels, `span`, then the
        analyzers' columns (units in `table.attrs["provenance"][run]["columns"]`). What an analyzer leaves out is NaN, counted by
        reason in the provenance. All texts are measured; which of them are copies of one another is in provenance too (`"copies"`),
        and statistics count each text once.

    Warns:
        BankWarning: most neighbors stand on the skeleton of their query's text (prompts of one template); the shares of every
            layer are in provenance (`"search"`: `"same_position"`, `"same_skeleton"`).

    Raises:
        BasinLensError: before any long work, if the model, the texts, the layers, the analyzers or the bank do not fit.
        TransportError: the block does not reproduce the captured states, or a route is not exact on this model.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", layers=[5], bank="reference", progress=False)
        >>> bool(table.compression.notna().any())
        True
    """
    return score(model, data, request).table


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
    check_model(model)
    capture, plan = _planned(model, data, request)
    # All that can be refused is refused before the model runs.
    if not capture.is_read:
        check_points(model, capture.layers, plan.of_tokens)
    tables.check_names([*{name for label in capture.labels for name in label}, *plan.columns])
    asked = query_rows(capture, request.queries, request.seed)
    run = None
    if plan.of_neighbors:
        bank = choose_bank(model, capture, request.bank, plan, progress=request.progress)
        run = Run(model, capture, bank, plan, asked, backend=request.backend, frozen=frozen, keep=keep_neighbors_of)
    of_tokens = plan.of_tokens
    if not capture.is_read:
        read_states(model, capture, of_tokens, batch_size=request.batch_size, progress=request.progress)
    again = fill_columns(model, capture, of_tokens, layers=plan.layers, progress=request.progress)
    results = Results.empty(plan, capture.n_rows)
    results.take_columns(capture)
    kept = None if run is None else _conduct(run, results, progress=request.progress)
    if run is not None and (said := warning(run.searches.facts["same_skeleton"])) is not None:
        warnings.warn(said, BankWarning, stacklevel=4)
    facts = provenance(request, capture, asked, results, read_again_for=again, frozen=frozen is not None)
    facts["made"] = tables.made_now(source_of(model))
    rows, labels = row_facts(capture)
    return Analysis(tables.build(rows, labels, plan.layers, results.values, tables.Provenance.from_json(facts)), kept)


def _planned(model: HookedModel, data: Capture | Texts, request: Request) -> tuple[Capture, Plan]:
    """The capture, read or only planned, and what to measure on it."""
    if not isinstance(data, Capture):
        layers = check_layers(model, request.layers)
        capture = Capture.plan(
            model,
            data,
            layers=layers,
            max_length=request.max_length,
            prepend_bos=request.prepend_bos,
            attention_mask=request.attention_mask,
        )
        return capture, Plan(layers, n_layers(model), request.chosen, request.seed)
    if request.attention_mask is not None:
        raise CaptureError("expected token ids with attention_mask, got a Capture. Give the mask where it is made.")
    data.check_model_is(model)
    plan = Plan(layers_asked(model, data, request.layers), n_layers(model), request.chosen, request.seed)
    check_cache(model, data, plan.path)
    return data, plan


def _conduct(run: Run, results: Results, *, progress: bool) -> KeptNeighbors | None:
    """Do the plan's pieces one after the other; the neighbors that were to be kept."""
    results.begin(run.facts())
    kept: list[LayerNeighbors] = []
    bar = tqdm(total=len(run.plan.layers), desc="neighbors through blocks", unit="layer", disable=hides_bars(progress))
    with measuring(run.model), bar:
        for layer in run.plan.layers:
            scores = run.layer(layer)
            results.add(scores)
            if run.keep is not None:
                kept.append(scores.neighbors or LayerNeighbors.none(run.capture.n_rows, run.keep.k))
            bar.update()
    if run.keep is None:
        return None
    return KeptNeighbors.of(kept, run.bank, run.keep.columns[0].name, own=not run.external)
