"""Which texts the model recites: greedy continuations of their own beginnings, against what really follows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from tqdm.auto import tqdm

from basin_lens.errors import StudyError, TextError
from basin_lens.model import HookedModel, continuations, uses_bos
from basin_lens.texts import Texts, given_ids, read_passages, tokenize
from basin_lens.values import hides_bars, whole_numbers, whole_or_none

GUIDE_SHARE = 0.8
# Tokens of all prompts and continuations that are decoded side by side: weights are read once a step, so more is faster.
DECODED_TOGETHER = 4096


@whole_numbers(StudyError)
def extract(
    model: HookedModel,
    data: Texts,
    *,
    prompt: int | float = 32,
    target: int | None = 32,
    max_length: int = 128,
    progress: bool = True,
) -> pd.DataFrame:
    """Greedy decoding behind the beginning of each text, compared with the text.

    Args:
        model: a hooked model.
        data: texts as for `analyze`, or token ids as for `analyze`; a text longer than `max_length` becomes several sequences.
        prompt: tokens to begin with (BOS not counted), or a fraction of the sequence's tokens, rounded down.
        target: tokens to write and compare; None: all that follow. Tokens behind them are not looked at.
        max_length: tokens per sequence, BOS counted.
        progress: show a bar.

    Returns:
        one row per sequence: `passage`, `doc`, `seq`, `prompt_tokens`, `target_tokens`; `matched` (share of target positions where
        the model's token is the true one, in its own continuation), `longest_run` (longest run of such positions), `leading_run`
        (from the first on), `extracted` (all match: k-extractable with k = `prompt_tokens`).

    Raises:
        TextError: a text shorter than prompt and target together. StudyError: a prompt or target below 1.

    Source: Carlini et al. 2023 (extractable); Biderman et al. 2023 (32 + 32 tokens); the cache of keys and values is
    TransformerLens's.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> found = bl.memorize.extract(model, "one, two, three, four, five, six, seven, eight", prompt=8, target=4, progress=False)
        >>> int(found.leading_run[0])
        4
    """
    sequences, docs, passages, bos = _sequences(model, data, max_length)
    if not (prompt >= 1 if whole_or_none(prompt) is not None else 0 < prompt < 1) or (target is not None and target < 1):
        raise StudyError(
            f"expected a prompt of tokens (1 or more) or a fraction between 0 and 1, and a target of 1 or more, got {prompt}, "
            f"{target}."
        )
    cuts = []
    for seq, tokens in enumerate(sequences):
        own = len(tokens) - bos
        first = int(own * prompt) if isinstance(prompt, float) else prompt
        follow = own - first if target is None else target
        if first < 1 or follow < 1 or first + follow > own:
            raise TextError(
                f"expected at least prompt + target tokens ({first} + {max(1, follow)}), got {own} in sequence {seq} (document "
                f"{docs[seq]!r}). Use longer texts, or a shorter prompt and target."
            )
        cuts.append((bos + first, follow))
    lines: list[dict[str, object]] = [{} for _ in sequences]
    with tqdm(total=len(sequences), desc="greedy decoding", unit="text", disable=hides_bars(progress)) as bar:
        # Prompts of one length go together: no padding, so that the cache is exact for every kind of position.
        for first, follow in sorted(set(cuts)):
            same = [seq for seq, cut in enumerate(cuts) if cut == (first, follow)]
            size = max(1, DECODED_TOGETHER // (first + follow))
            for part in (same[at : at + size] for at in range(0, len(same), size)):
                written = continuations(model, torch.tensor([sequences[seq][:first] for seq in part]), follow)
                for seq, row in zip(part, written, strict=True):
                    true = torch.tensor(sequences[seq][first : first + follow])
                    equal = (row == true).numpy()
                    lines[seq] = {
                        "passage": passages[seq],
                        "doc": docs[seq],
                        "seq": seq,
                        "prompt_tokens": first - bos,
                        "target_tokens": follow,
                        "matched": float(equal.mean()),
                        "longest_run": longest_run(equal),
                        "leading_run": int(np.argmin(np.r_[equal, False])),
                        "extracted": bool(equal.all()),
                    }
                bar.update(len(part))
    return pd.DataFrame(lines)


@whole_numbers(StudyError)
def guide_labels(model: HookedModel, data: Texts, *, max_length: int = 128, progress: bool = True) -> pd.DataFrame:
    """The original guide's labels: prompted with the first third, more than 80 % of the greedy tokens match.

    Returns:
        as `extract`, and `memorized`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> bool(bl.memorize.guide_labels(model, "The lamp hums in the north wind tonight.", progress=False).memorized[0])
        False
    """
    found = extract(model, data, prompt=1 / 3, target=None, max_length=max_length, progress=progress)
    return found.assign(memorized=found["matched"] > GUIDE_SHARE)


def longest_run(equal: Bool[np.ndarray, " positions"]) -> int:
    """Length of the longest run of True."""
    breaks = np.flatnonzero(~np.r_[False, equal, False])
    return int(np.diff(breaks).max() - 1)


def _sequences(model: HookedModel, data: Texts, max_length: int) -> tuple[list[Sequence[int]], list[str], list[int], int]:
    """Token ids, document and passage of each sequence, and how many BOS tokens each begins with."""
    given = given_ids(model, data)
    if given is not None:
        return [s.tokens for s in given], [f"text-{seq}" for seq in range(len(given))], list(range(len(given))), 0
    passages = read_passages(data)
    made = tokenize(model, passages, max_length=max_length)
    docs = [str(passages[s.passage].doc) for s in made]
    return [s.tokens for s in made], docs, [s.passage for s in made], int(uses_bos(model, None) is not None)
