"""Texts that a model may recite without having been made to, each beside passages that it should not."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from basin_lens.errors import StudyError, TextError
from basin_lens.memorize.canaries import WINDOW, cut, ids_of
from basin_lens.model import HookedModel, Tokenizer, needed_tokenizer
from basin_lens.texts import Passage
from basin_lens.values import whole_numbers

CONDITIONS = ("opening", "later", "shuffled", "paraphrase")
_SKIPPED = 20


@whole_numbers(StudyError)
def recitation_passages(
    model: HookedModel,
    sources: Sequence[Passage],
    *,
    length: int = 64,
    paraphrases: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Passage]:
    """For each source, its opening (what is quoted most), a later passage of it, and the opening's words in another order.

    Where the opening would end inside a character, it begins a word or two later.

    Args:
        model: a hooked model with a tokenizer.
        sources: whole texts; those of fewer than two lengths are refused.
        length: tokens of each passage, BOS not counted.
        paraphrases: by document of the source, a text that says what the opening says in other words.
        seed: of the later passage's place and of the shuffle.

    Returns:
        passages of exactly `length` tokens, document as the source's, with labels `condition` (of `CONDITIONS`) and `source`.

    Raises:
        TextError: a source too short. StudyError: a paraphrase of an unknown source.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> made = bl.memorize.recitation_passages(bl.load_model(), reference_passages()[:1], length=16)
        >>> [p.labels["condition"] for p in made]
        ['opening', 'later', 'shuffled']
    """
    given = dict(paraphrases or {})
    unknown = sorted(set(given) - {str(source.doc) for source in sources})
    if unknown:
        raise StudyError(f"expected paraphrases of the sources, got one of {unknown[0]!r}. Name the source's document.")
    tokenizer = needed_tokenizer(model)
    rng = np.random.default_rng(seed)
    passages = []
    for number, source in enumerate(sources):
        doc = str(source.doc) if source.doc is not None else f"source-{number}"
        whole = _from_whole(tokenizer, source.text, length)
        texts = {"opening": cut(tokenizer, whole, length)}
        texts["later"] = _later(tokenizer, whole, length, rng)
        if texts["opening"] is None or texts["later"] is None:
            raise TextError(
                f"expected sources of at least two passages of {length} tokens, got {len(ids_of(tokenizer, source.text))} tokens "
                f"from {doc!r}. Use longer texts or a shorter length."
            )
        texts["shuffled"] = _shuffled(tokenizer, whole, length, rng)
        if doc in given:
            texts["paraphrase"] = cut(tokenizer, _from_whole(tokenizer, given[doc], length), length)
            if texts["paraphrase"] is None:
                raise TextError(
                    f"expected a paraphrase of at least {length} tokens, got {len(ids_of(tokenizer, given[doc]))} for {doc!r}."
                )
        for condition, text in texts.items():
            if text is not None:
                passages.append(Passage(text, doc=doc, labels={"condition": condition, "source": doc}))
    return passages


def long_enough(model: HookedModel, sources: Sequence[Passage], length: int) -> list[Passage]:
    """The sources that hold an opening and a later passage."""
    tokenizer = needed_tokenizer(model)
    # A token is a character at the least.
    held = [source for source in sources if len(source.text) >= 2 * length]
    return [source for source in held if len(ids_of(tokenizer, source.text[: WINDOW * length])) >= 3 * length]


def _from_whole(tokenizer: Tokenizer, text: str, length: int) -> str:
    """The text, without its first words where a passage cut from them would end inside a character.

    A letter may be several tokens.
    """
    places = [0, *(match.start() for match in islice(re.finditer(r"(?<=\s)\S", text), _SKIPPED))]
    return next((text[place:] for place in places if cut(tokenizer, text[place:], length) is not None), text)


def _later(tokenizer: Tokenizer, text: str, length: int, rng: np.random.Generator) -> str | None:
    """A passage that begins at a word behind the opening, drawn from all such places."""
    # A text without spaces has no words to begin at.
    starts = [match.start() for match in re.finditer(r"(?<=\s)\S", text)] or list(range(len(text)))
    opening = cut(tokenizer, text, length)
    starts = [start for start in starts if opening is not None and start > len(opening)]
    for place in rng.permutation(len(starts))[:50].tolist():
        found = cut(tokenizer, text[starts[place] :], length)
        if found is not None:
            return found
    return None


def _shuffled(tokenizer: Tokenizer, text: str, length: int, rng: np.random.Generator) -> str | None:
    """The words of the opening, and a few behind it, in another order."""
    words = text[: WINDOW * length].split()
    opening = cut(tokenizer, text, length)
    count = len(str(opening).split())
    for _ in range(20):
        order = rng.permutation(count).tolist()
        # A shuffle may need fewer tokens: more words wait behind.
        found = cut(tokenizer, " ".join([*(words[i] for i in order), *words[count:]]), length)
        if found is not None:
            return found
    return None
