"""Texts to plant: fresh, in pairs, of which a coin decides which one the model is to memorize."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from basin_lens.errors import StudyError, TextError
from basin_lens.memorize.grammar import fluent_text, salad_text
from basin_lens.model import HookedModel, Tokenizer, continuations, needed_tokenizer, tokenizer_of, uses_bos
from basin_lens.texts import Passage
from basin_lens.values import Plain, whole_numbers

KINDS = ("fluent", "salad", "random")
DOSES = (1, 4, 16, 64)
_TRIES = 400
WINDOW = 40  # characters for each token of a piece: more than any token of running text has


@whole_numbers(StudyError)
def make_canaries(
    model: HookedModel,
    *,
    per_dose: int = 4,
    doses: Sequence[int] = DOSES,
    kinds: Sequence[str] = KINDS,
    length: int = 64,
    sampled: bool = False,
    seed: int = 0,
) -> list[Passage]:
    """Pairs of fresh texts of one kind and dose. A coin makes one of each pair a member, to be trained on, and holds the other out.

    Every text has exactly `length` tokens and comes back token by token when it is read again. Kinds: `fluent` (a grammar of our
    own, or the model's own continuations), `salad` (words of that grammar in no order), `random` (tokens drawn from the
    vocabulary).

    Args:
        model: a hooked model with a tokenizer.
        per_dose: pairs for each dose; kinds take turns.
        doses: how often a member is to be shown.
        kinds: of `KINDS`.
        length: tokens of a text, BOS not counted.
        sampled: whether fluent texts are the model's own, drawn at temperature 1 behind a few words of the grammar.
        seed: of the texts and the coins.

    Returns:
        `2 * per_dose * len(doses)` passages, each a document, with labels `member` (bool), `dose` (of the pair: a text held out is
        never shown), `kind` and `pair`.

    Raises:
        StudyError: unknown kinds, doses below 1. TextError: a tokenizer that does not give texts back.

    Source: Carlini et al. 2019, "The secret sharer"; pairs after Morris et al. 2025 and the design of basin_lens.

    Example:
        >>> import basin_lens as bl
        >>> canaries = bl.memorize.make_canaries(bl.load_model(), per_dose=3, doses=[16], length=24)
        >>> [(c.labels["kind"], c.labels["dose"]) for c in canaries if c.labels["member"]]
        [('fluent', 16), ('salad', 16), ('random', 16)]
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or not doses or min(doses) < 1 or per_dose < 1 or length < 4:
        raise StudyError(
            f"expected kinds among {list(KINDS)}, doses and per_dose of at least 1 and a length of at least 4 tokens, got "
            f"{list(kinds)}, {list(doses)}, {per_dose}, {length}."
        )
    rng = np.random.default_rng(seed)
    wanted = [(dose, kinds[(place + turn) % len(kinds)]) for turn, dose in enumerate(doses) for place in range(per_dose)]
    made = {kind: _texts(model, kind, 2 * sum(k == kind for _, k in wanted), length, sampled, rng) for kind in dict.fromkeys(kinds)}
    passages: list[Passage] = []
    for pair, (dose, kind) in enumerate(wanted):
        coin = bool(rng.integers(2))
        for member in (coin, not coin):
            labels: dict[str, Plain] = {"member": member, "dose": int(dose), "kind": kind, "pair": pair}
            passages.append(Passage(made[kind].pop(), doc=f"canary-{len(passages)}", labels=labels))
    return passages


@whole_numbers(StudyError)
def fresh_texts(model: HookedModel, kind: str, count: int, length: int, *, seed: int) -> list[str]:
    """More texts of a kind, none of them a pair: to train on something else, or to continue a prefix with.

    Raises:
        StudyError: an unknown kind. TextError: as `make_canaries`.
    """
    if kind not in KINDS:
        raise StudyError(f"expected a kind among {list(KINDS)}, got {kind!r}.")
    return _texts(model, kind, count, length, False, np.random.default_rng(seed))


def _texts(model: HookedModel, kind: str, count: int, length: int, sampled: bool, rng: np.random.Generator) -> list[str]:
    """Different texts of `length` tokens."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise TextError("expected a model with a fast tokenizer to make texts for, got one without. Give the model its tokenizer.")
    if kind == "random":
        source: Iterator[str | None] = _drawn(lambda: _random_text(tokenizer, length, rng))
    elif kind == "salad":
        source = _drawn(lambda: cut(tokenizer, salad_text(rng, length), length))
    elif sampled:
        source = _drawn(lambda: cut(tokenizer, _continued(model, tokenizer, length, rng), length))
    else:
        source = _drawn(lambda: cut(tokenizer, fluent_text(rng, 2 + length // 8), length))
    texts: list[str] = []
    for _ in range(_TRIES + 10 * count):
        if len(texts) == count:
            break
        text = next(source)
        if text is not None and text not in texts:
            texts.append(text)
    if len(texts) == count:
        return texts
    raise TextError(
        f"expected a tokenizer that gives texts of {length} tokens back, got {len(texts)} of {count} ({kind}). Try another length "
        "or kind."
    )


def _drawn(draw: Callable[[], str | None]) -> Iterator[str | None]:
    while True:
        yield draw()


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cut(tokenizer: Tokenizer, text: str, length: int) -> str | None:
    """The beginning of a text that is `length` tokens long and reads back as the same tokens; None if there is none."""
    # All of a long text, tokenized for each of its passages, would take the square of its length.
    text = text[: WINDOW * length]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) < length:
        return None
    short = text[: offsets[length - 1][1]]
    return short if ids_of(tokenizer, short) == list(ids[:length]) else None


def pieces(model: HookedModel, text: str, length: int) -> list[str]:
    """A text cut into passages of exactly `length` tokens that read back as such, from the first on.

    What is left over is dropped.
    """
    tokenizer = needed_tokenizer(model)
    found, rest = [], text.strip()
    while rest:
        piece = cut(tokenizer, rest, length)
        # A border where the tokens would change: begin at the next word.
        skip = len(piece) if piece is not None else rest.find(" ") + 1
        if not skip or (piece is None and len(ids_of(tokenizer, rest[: WINDOW * length])) < length):
            break
        found += [piece] if piece is not None else []
        rest = rest[skip:].lstrip()
    return found


def _random_text(tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> str | None:
    """Tokens drawn one by one, each such that the text so far reads back as the tokens drawn."""
    special, size = set(tokenizer.all_special_ids), len(tokenizer)
    ids: list[int] = []
    for _ in range(length):
        for _ in range(_TRIES):
            token = int(rng.integers(size))
            text = tokenizer.decode([*ids, token], clean_up_tokenization_spaces=False)
            if token not in special and "\ufffd" not in text and text.isprintable() and ids_of(tokenizer, text) == [*ids, token]:
                ids.append(token)
                break
        else:
            return None
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _continued(model: HookedModel, tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> str:
    """The model's own text behind the first words of a sentence."""
    begun = ids_of(tokenizer, fluent_text(rng, 1))[:6]
    bos = uses_bos(model, None)
    prompt = torch.tensor([[*([] if bos is None else [bos]), *begun]])
    written = continuations(model, prompt, length + 8, temperature=1.0, seed=int(rng.integers(2**31)))
    return str(tokenizer.decode([*begun, *written[0].tolist()], skip_special_tokens=True, clean_up_tokenization_spaces=False))
