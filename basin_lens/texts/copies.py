"""Which texts are copies of one another: equal ones, and those that share long runs of tokens.

One text given several times is one observation, however many rows it makes, and a text that was seen in training is no test. So
copies are found once, where texts are measured, and everything that counts texts counts them once.

- White space and a byte order mark do not make another text: tokens that hold nothing else are passed over, and tokens that differ
  in nothing else are the same.
- Equal texts are copies, however short.
- A text of at least `LONG` tokens (and `LETTERS` letters) is a copy of another, or of a group of copies, if at least `SHARE` of its
  tokens (of the shorter of the two) stand in runs of `N` tokens that the other has too: a title line in front, words changed,
  a window shifted over the same long text, an excerpt.
- A shorter text of at least `N` tokens is a copy of one that holds all of it, run by run.
  Prompts of one template differ in a word or two, and a short text with a changed word cannot be told from them: both are texts of
  their own.
- A run that more than `COMMON` different texts have (a licence header, an instruction in front of every prompt) counts neither for
  nor against.
- A copy of a copy is a copy: groups are closed.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from basin_lens.model import HookedModel
from basin_lens.texts.passages import Passage
from basin_lens.texts.tokens import TokenSequence, token_strings, tokenize
from basin_lens.values import Facts

N = 13  # tokens of a run; Brown et al. 2020, appendix C
SHARE = 0.5  # of the shorter text's tokens; windows that overlap by half reach it, different texts of one corpus stay below 0.1
LONG = 32  # tokens from which a part of a text can make it a copy; prompts of the templates in use have 12 to 25
LETTERS = 120  # characters that are no white space, needed besides where they are known; such prompts have 40 to 95
COMMON = 50  # texts; what more have is boilerplate, and nobody has to compare them all with one another


def groups_of_copies(texts: Sequence[Sequence[int]], strings: Mapping[int, str] | None = None) -> list[list[int]]:
    """Groups of texts that are copies of one another.

    Args:
        texts: token ids of each whole text (chunks joined, BOS left out).
        strings: the text of each token id, to see white space by; None: ids as they are.

    Returns:
        for each group of two or more, the texts' indices. The first of a group stands for it: the first text in order that is at
        least half as long as the longest. Then the others in order; groups in the order of their first members.

    Source: Brown et al. 2020, appendix C, and Lee et al. 2022 (shared runs of tokens); the measure of shared runs is ours.

    Example:
        >>> from basin_lens.texts.copies import groups_of_copies
        >>> text = list(range(40))
        >>> groups_of_copies([text, [7, *text], list(range(100, 140)), text[:20] + [999] + text[21:]])
        [[0, 1, 3]]
    """
    bare = _bare(texts, strings)
    roots = _Groups(len(bare))
    first: dict[bytes, int] = {}
    for index, text in enumerate(bare):
        roots.join(first.setdefault(text.tobytes(), index), index)
    different = sorted(first.values())
    size = {} if strings is None else {token: len("".join(string.split())) for token, string in strings.items()}
    # By a tokenizer of bytes or letters, a prompt of a template has many tokens.
    long = [
        len(b) >= LONG and (not size or sum(size.get(t, 1) for t in text) >= LETTERS) for b, text in zip(bare, texts, strict=True)
    ]
    _join_overlapping([bare[index] for index in different], different, roots, long)
    groups: dict[int, list[int]] = {}
    for index in range(len(bare)):
        groups.setdefault(roots.of(index), []).append(index)
    return [_first_stands(group, bare) for group in groups.values() if len(group) > 1]


def whole_texts(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Tokens of each passage, its chunks joined; a token that is not text (BOS) is left out where the others have offsets."""
    texts: list[list[int]] = [[] for _ in range(1 + max(s.passage for s in sequences))]
    for s in sequences:
        offsets = max(s.starts, default=-1) >= 0
        texts[s.passage] += [token for token, start in zip(s.tokens, s.starts, strict=True) if start >= 0 or not offsets]
    return texts


def copies_in(sequences: Sequence[TokenSequence], docs: Sequence[str], strings: Mapping[int, str]) -> Facts:
    """Copies among the passages of a capture, as plain JSON: what provenance keeps of them.

    Returns:
        `n`, `share`, `long`, `common`: the rule; `texts` and `distinct`: how many passages, and how many different ones;
        `sequences`: how many;
        `groups`: of two or more passages, the first of which stands for all: `passage`, `doc`, `sequences` (which are of it).
    """
    texts = whole_texts(sequences)
    chunks: dict[int, list[int]] = {}
    for index, s in enumerate(sequences):
        chunks.setdefault(s.passage, []).append(index)
    there = sorted(chunks)
    groups = [[there[index] for index in group] for group in groups_of_copies([texts[passage] for passage in there], strings)]
    return {
        "n": N,
        "share": SHARE,
        "long": LONG,
        "common": COMMON,
        "texts": len(chunks),
        "distinct": len(chunks) - sum(len(group) - 1 for group in groups),
        "sequences": len(sequences),
        "groups": [[{"passage": p, "doc": docs[chunks[p][0]], "sequences": chunks[p]} for p in group] for group in groups],
    }


def copies_of_others(
    texts: Sequence[Sequence[int]], others: Sequence[Sequence[int]], strings: Mapping[int, str] | None = None
) -> list[int]:
    """Indices of the texts that are copies of any of the others: held-out texts that were trained on.

    Example:
        >>> from basin_lens.texts.copies import copies_of_others
        >>> copies_of_others([[1, 2, 3], [4, 5, 6]], [[4, 5, 6]])
        [1]
    """
    count = len(texts)
    groups = groups_of_copies([*texts, *others], strings)
    return sorted(index for group in groups if max(group) >= count for index in group if index < count)


def copied_passages(model: HookedModel, passages: Sequence[Passage], others: Sequence[Passage]) -> list[int]:
    """Indices of the passages that are copies of any of the others, by the tokens of a model; see `copies_of_others`."""
    groups = passage_groups(model, [*passages, *others])
    count = len(passages)
    return sorted(index for group in groups if max(group) >= count for index in group if index < count)


def passage_groups(model: HookedModel, passages: Sequence[Passage]) -> list[list[int]]:
    """Groups of passages that are copies of one another, by the tokens of a model; see `groups_of_copies`."""
    if not passages:
        return []
    texts = whole_texts(tokenize(model, list(passages), prepend_bos=False))
    return groups_of_copies(texts, token_strings(model, (token for text in texts for token in text)))


def runs_of(tokens: Int[np.ndarray, "texts tokens"]) -> Int[np.ndarray, "texts runs"]:
    """A number for each run of `N` tokens of texts of one length, by which it is known again.

    Chance gives two runs one number once in 2^64.
    """
    if tokens.shape[1] < N:
        return np.empty((len(tokens), 0), np.int64)
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), N, axis=1)
    mixed = np.zeros(runs.shape[:2], np.uint64)
    for place in range(N):
        # The finalizer of splitmix64 (Steele, Lea and Flood 2014), which lets every bit reach every other.
        mixed = (mixed ^ runs[:, :, place]) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed.view(np.int64)


def made_of_runs(tokens: Int[np.ndarray, "texts tokens"], known: Int[np.ndarray, " runs"]) -> Bool[np.ndarray, " texts"]:
    """Which texts are copies of what the known runs (of `runs_of`) were taken from."""
    count = tokens.shape[1]
    there = np.isin(runs_of(tokens), known)
    return np.array([_enough(np.flatnonzero(row), count, np.ones(count, bool), count >= LONG) for row in there], bool)


def _bare(texts: Sequence[Sequence[int]], strings: Mapping[int, str] | None) -> list[Int[np.ndarray, " tokens"]]:
    """Tokens without white space and byte order marks, numbered anew from 0; a text of nothing else keeps its own."""
    lengths = [len(text) for text in texts]
    flat = np.fromiter((token for text in texts for token in text), np.int64, sum(lengths))
    ids, places = np.unique(flat, return_inverse=True)
    known: dict[int | str, int] = {}
    numbers = np.array([_number(int(token), strings, known) for token in ids], np.int64) if len(ids) else ids
    held = np.split(numbers[places], np.cumsum(lengths)[:-1]) if texts else []
    plain = np.split(places, np.cumsum(lengths)[:-1]) if texts else []
    # Below 0, so that what is kept as it is cannot be taken for a bare text.
    return [text[text >= 0] if (text >= 0).any() else -2 - own for text, own in zip(held, plain, strict=True)]


def _number(token: int, strings: Mapping[int, str] | None, known: dict[int | str, int]) -> int:
    string = None if strings is None else strings.get(token)
    # Part of a character shows as U+FFFD, whatever part it is: such tokens are told apart by their ids.
    if string is None or "\ufffd" in string:
        return known.setdefault(token, len(known))
    word = string.replace("\ufeff", "").strip()
    return known.setdefault(word, len(known)) if word else -1


def _first_stands(group: list[int], texts: Sequence[np.ndarray]) -> list[int]:
    longest = max(len(texts[index]) for index in group)
    first = next(index for index in group if 2 * len(texts[index]) >= longest)
    return [first, *(index for index in group if index != first)]


class _Groups:
    """Disjoint sets of numbers; a set is known by its smallest."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def of(self, index: int) -> int:
        root = index
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[index] != root:
            self.parent[index], index = root, self.parent[index]
        return root

    def join(self, a: int, b: int) -> int:
        a, b = sorted((self.of(a), self.of(b)))
        self.parent[b] = a
        return a


def closed_groups(count: int, pairs: Iterable[Sequence[int]]) -> Int[np.ndarray, " count"]:
    """The smallest member of each number's group, where both of a pair are of one group, and a member's member is one too."""
    groups = _Groups(count)
    for a, b in pairs:
        groups.join(a, b)
    return np.array([groups.of(index) for index in range(count)], np.int64)


def _join_overlapping(texts: Sequence[np.ndarray], names: Sequence[int], roots: _Groups, long: Sequence[bool]) -> None:
    """Join the texts that share runs, longest first: each is then the shorter one of every pair that it is looked at in.

    What is kept of a run is the groups that have it, not the texts: a thousand near copies are one group. A run that `COMMON`
    groups have takes no more, so the work grows with the texts and not with their pairs.
    """
    runs = _shared_runs(texts)
    having: dict[int, list[int]] = {}
    boilerplate: dict[int, int] = {}  # run -> the last group of texts made of such runs
    for index in sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)):
        places, keys = runs[index]
        if not len(places):
            continue
        root, count = roots.of(names[index]), len(texts[index])
        common = np.array([len(having.get(key, ())) >= COMMON for key in keys])
        outside = ~_covered(places[common], count)
        made_of_it = int(outside.sum()) < N
        at: dict[int, list[int]] = {}
        for place, key, often in zip(places.tolist(), keys, common.tolist(), strict=True):
            if not often:
                for other in {roots.of(other) for other in having.get(key, ())}:
                    at.setdefault(other, []).append(place)
            elif made_of_it and key in boilerplate:
                at.setdefault(roots.of(boilerplate[key]), []).append(place)
        counted = np.ones(count, bool) if made_of_it else outside
        for other, found in at.items():
            if _enough(np.array(found), count, counted, long[names[index]]):
                root = roots.join(root, other)
        for key, often in zip(keys, common.tolist(), strict=True):
            groups = having.setdefault(key, [])
            if not often and root not in groups:
                having[key] = list({root, *map(roots.of, groups)})
            elif often and made_of_it:
                boilerplate[key] = root


def _enough(places: Int[np.ndarray, " runs"], count: int, counted: Bool[np.ndarray, " tokens"], long: bool) -> bool:
    """Whether runs at these places make a text of `count` tokens a copy; the tokens counted are those outside of boilerplate."""
    share = SHARE if long else 1.0
    # No more can be covered: most pairs end here.
    if len(places) * N < share * counted.sum():
        return False
    return bool(_covered(places, count)[counted].mean() >= share)


def _covered(places: Int[np.ndarray, " runs"], count: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens stand in runs that begin at these places."""
    steps = np.zeros(count + 1, np.int64)
    np.add.at(steps, places, 1)
    np.add.at(steps, places + N, -1)
    return steps.cumsum()[:-1] > 0


def _shared_runs(texts: Sequence[np.ndarray]) -> list[tuple[Int[np.ndarray, " runs"], list[int]]]:
    """Of each text, where runs of `N` tokens begin that another text has too, and numbers that tell runs apart.

    Exactly, not by hashes: a run of two has the number of its pair of tokens, one of four that of its pair of pairs, and so on.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    flat = np.concatenate([*texts, np.empty(0, np.int64)])
    text_of = np.repeat(np.arange(len(texts)), lengths)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(flat)) - starts[text_of] if len(flat) else flat
    numbers, width = np.unique(flat, return_inverse=True)[1].reshape(-1), 1
    while width < N:
        step = min(width, N - width)
        later = np.concatenate([numbers[step:], np.zeros(min(step, len(numbers)), np.int64)])
        numbers = np.unique(numbers * (len(flat) + 1) + later, return_inverse=True)[1].reshape(-1)
        width += step
    whole = place + N <= lengths[text_of] if len(flat) else np.empty(0, bool)
    numbers, text_of, place = numbers[whole], text_of[whole], place[whole]
    pairs = np.unique(numbers * max(1, len(texts)) + text_of) // max(1, len(texts))
    run, texts_having = np.unique(pairs, return_counts=True)
    shared = np.isin(numbers, run[texts_having > 1])
    numbers, text_of, place = numbers[shared], text_of[shared], place[shared]
    cuts = np.searchsorted(text_of, np.arange(1, len(texts)))
    return list(zip(np.split(place, cuts), (part.tolist() for part in np.split(numbers, cuts)), strict=True))
