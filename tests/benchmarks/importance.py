"""What scores and token importance cost together, beside one forward and one backward pass and the neighbor search by itself.

    NLTK_DATA=... python tests/benchmarks/importance.py [ROUNDS]

One `bl.analyze` of 100 sequences of 128 tokens (the inaugural speeches of NLTK) on all 30 layers of SmolLM2-135M. The reference is what
cannot be saved: the same texts forward and backward in plain TransformerLens (8 sequences at a time, as in the capture; gradients of
the summed loss with respect to the states that enter each block, the parameters frozen), plus `find` at each layer. Erasure and
integrated gradients make passes of their own and are measured apart. Prints what it measures; the last line is JSON.

Contestants take turns, and ratios are medians over rounds of the ratio within a round, because these machines are noisy. Where others
use the machine at the same time, look at processor time, with OMP_NUM_THREADS=1: waiting for one another, threads burn it. A round
takes about 10 minutes of one core. Where the time goes is taken from a profile of the first, unmeasured analysis.
"""

import cProfile
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import PurePath

import torch

import basin_lens as bl
from basin_lens import analyzers as A  # noqa: N812
from basin_lens.neighbors import Points, find, prefix_keys

K, LENGTH, SEQUENCES, BATCH = 15, 128, 100, 8

SCORES = [A.Contraction(context="native"), A.RawCompression(), A.Neighborhood()]
IMPORTANCE = [
    A.Surprisal(), A.StateNorm(), A.AttentionReceived(), A.AttentionReceived(sink=False), A.AttentionReceived(normalize=False),
    A.AttentionRollout(), A.ValueWeightedAttention(), A.GradientNorm(), A.GradientTimesActivation(),
]  # fmt: skip
# Those that make passes of their own, each on so many sequences: at its default, integrated gradients may double its steps three times.
OWN_PASSES = [(A.Erasure(), 8), (A.IntegratedGradients(), 1)]

# Where an analysis spends its time: functions whose time is added up, less those that are called inside them. A function is named by the
# end of its file and its name, after a caller and " > " where only calls from there count; "alone": without what it calls.
PARTS = {
    "forward pass": (["forward_reader.py:read > hooks.py:forward_pass"], ["forward_reader.py:_read_state"]),
    "loss of later tokens": (["passes.py:target_values"], []),
    "backward pass": (["autograd/__init__.py:grad"], []),
    "states kept, one batch after the other": (
        ["forward_reader.py:_read_state", "forward_reader.py:_read_point"],
        ["forward_reader.py:_run"],
    ),
    "attention received, three ways": (["analyzers/attention.py:measure"], []),
    "attention rollout": (["attention_rollout.py:measure"], []),
    "value-weighted attention": (["value_weighted_attention.py:measure"], []),
    "gradient norm, gradient times activation": (["gradient.py:measure", "gradient_times_activation.py:measure"], []),
    "surprisal, state norm": (["surprisal.py:measure", "state_norm.py:measure"], []),
    "columns of the capture": (["columns.py:keep_values"], []),
    "neighbor search": (["scoring/search.py:find"], []),
    "proof that blocks map as captured": (["proof.py:prove"], []),
    "variance of a layer": (["map_scores.py:__init__ > contract.py:own_spread"], []),
    "native images": (["maps.py:of_rows", "alone map_scores.py:_look", "map_scores.py:_look > <method 'gather'"], []),
    "neighbors' states": (["map_scores.py:_neighborhoods"], []),
    "scores": ([f"/{name}.py:measure" for name in ("contraction", "raw_compression", "neighborhood")], []),
    "halves of the neighbors, but for the scores": (["contract.py:split_half"], []),
    "reliability": (["reliability.py:rank_agreement"], []),
    "table": (["frame.py:build", "token_rows.py:row_facts"], []),
    "fingerprint of the model": (["identity.py:fingerprint"], []),
}


def timed(run):
    """Seconds by the clock and of the processor."""
    before = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - before[0], time.process_time() - before[1]


def plus(*times):
    return tuple(map(sum, zip(*times, strict=True)))


def forward(model, tokens):
    with torch.no_grad():
        for part in tokens.split(BATCH):
            model(part, return_type="logits")


def forward_and_backward(model, tokens, *, frozen=True):
    """Times of each: the loss of later tokens, and its gradients with respect to the states that enter the blocks.

    With `frozen=False`, those of the parameters too, as a user gets them who calls `backward` on a model as it is loaded.
    """
    states, losses = [], []
    hooks = [(f"blocks.{layer}.hook_resid_pre", lambda state, hook: states.append(state)) for layer in range(model.cfg.n_layers)]  # noqa: ARG005
    parameters = [] if frozen else list(model.original_model.parameters())
    if frozen:  # or there would be nothing to go back to
        hooks.append(("hook_embed", lambda state, hook: state.detach().requires_grad_()))  # noqa: ARG005

    def ahead(part):
        logits = model.run_with_hooks(part, return_type="logits", fwd_hooks=hooks)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))

    def back():
        torch.autograd.grad(losses.pop(), states + parameters, allow_unused=not frozen)
        states.clear()

    model.requires_grad_(not frozen)
    times = [(timed(lambda part=part: ahead(part)), timed(back)) for part in tokens.split(BATCH)]
    model.requires_grad_(True)
    return [plus(*column) for column in zip(*times, strict=True)]


def search(capture):
    """The neighbors of every token but the first of each sequence at every layer, as the native scores need them."""
    (keys,) = prefix_keys([s.tokens for s in capture.sequences])
    pool = capture.row_pos > 0
    for layer in capture.layers:
        # Bare embeddings enter block 0, so that equal tokens are one point there.
        key = keys if layer else capture.row_token
        points = Points(capture.resid_pre(layer), key, capture.row_token, capture.row_seq, pool)
        find(points.some(torch.nonzero(pool).squeeze(1)), points, K)


def profiled(run):
    """Seconds of the processor in all, and in each of `PARTS`."""
    profile = cProfile.Profile(time.process_time)
    _, whole = timed(lambda: profile.runcall(run))
    profile.create_stats()

    def matches(function, name):
        path, _, called = function
        return called.startswith(name) if name.startswith("<") else f"{PurePath(path).as_posix()}:{called}".endswith(name)

    def seconds(name):
        alone, (caller, _, name) = name.startswith("alone "), name.removeprefix("alone ").rpartition(" > ")
        found = [facts for function, facts in profile.stats.items() if matches(function, name)]
        if caller:
            found = [by for facts in found for function, by in facts[4].items() if matches(function, caller)]
        assert found, name
        return sum(facts[2 if alone else 3] for facts in found)

    parts = {name: sum(map(seconds, inside)) - sum(map(seconds, less)) for name, (inside, less) in PARTS.items()}
    return whole, parts | {"everything else": whole - sum(parts.values())}


def main():
    from nltk.corpus import inaugural

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.manual_seed(0)
    model = bl.load_model()
    tokens = torch.tensor(model.tokenizer(inaugural.raw()[:100_000])["input_ids"])[: SEQUENCES * LENGTH].reshape(-1, LENGTH)

    def analyze():
        bl.analyze(model, tokens, [*SCORES, *IMPORTANCE], progress=False)

    profile_s, parts = profiled(analyze)
    print(f"where {profile_s:.0f} s of processor time go in one analysis, of {tokens.numel():,} tokens:")
    for name, seconds in parts.items():
        print(f"    {name:42s}{seconds:8.1f} s{seconds / profile_s:8.1%}", flush=True)

    capture = bl.Capture.from_texts(model, tokens, progress=False)
    forward(model, tokens[:BATCH])
    times = []
    for _ in range(rounds):
        row = {"forward, no graph": timed(lambda: forward(model, tokens))}
        row["forward"], row["backward"] = forward_and_backward(model, tokens)
        row["search"] = timed(lambda: search(capture))
        row["analysis"] = timed(analyze)
        learned = forward_and_backward(model, tokens, frozen=False)
        row["forward and backward, parameters learned"] = plus(*learned)
        row["reference"] = plus(row["forward"], row["backward"], row["search"])
        row["reference, parameters learned"] = plus(*learned, row["search"])
        times.append(row)
        ratios = [row["analysis"][clock] / row["reference"][clock] for clock in (0, 1)]
        print(
            f"round: analysis / reference {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the processor; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )

    def median(name, clock):
        return statistics.median(row[name][clock] for row in times)

    def ratio(name, other, clock):
        return round(statistics.median(row[name][clock] / row[other][clock] for row in times), 3)

    print(f"{'':44s}{'clock':>10s}{'':14s}{'processor':>14s}")
    for name in times[0]:
        seconds = [f"{median(name, clock):8.1f} s{tokens.numel() / median(name, clock):8.0f} tokens/s" for clock in (0, 1)]
        print(f"    {name:42s}" + "  ".join(seconds))
    for other in ("reference", "reference, parameters learned"):
        ratios = [ratio("analysis", other, clock) for clock in (0, 1)]
        print(f"analysis / {other}: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the processor")

    own = {}
    for analyzer, count in OWN_PASSES:
        name, some = type(analyzer).__name__, tokens[:count]
        found = []
        spent = timed(lambda a=analyzer, t=some, f=found: f.append(bl.analyze(model, t, [a], layers=[0], progress=False)))
        own[name] = [round(some.numel() / seconds, 1) for seconds in spent]
        there = found[0][analyzer.columns[0].name].notna().sum() / count
        print(f"{name}: {own[name][0]} tokens/s by the clock, {own[name][1]} of the processor; values at {there:.0f} of {LENGTH} tokens; "
              f"60 sequences would take {60 / count * spent[0]:.0f} s ({60 / count * spent[1]:.0f} s of the processor)")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({
        "benchmark": "importance", "commit": commit, "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "model": "smollm2-135m", "length": LENGTH, "k": K,
        "sequences": SEQUENCES, "rounds": rounds,
        "over_reference": ratio("analysis", "reference", 0), "over_reference_processor": ratio("analysis", "reference", 1),
        "over_reference_learned": ratio("analysis", "reference, parameters learned", 0),
        "over_reference_learned_processor": ratio("analysis", "reference, parameters learned", 1),
        "tokens_per_s": round(tokens.numel() / median("analysis", 0), 1),
        "processor_s": {name: round(median(name, 1), 1) for name in times[0]},
        "profile_s": {name: round(seconds, 1) for name, seconds in parts.items()}, "own_passes_tokens_per_s": own,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
