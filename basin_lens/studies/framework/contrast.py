"""Two kinds of tokens or texts to be compared in every study."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool

from basin_lens import tables
from basin_lens.capture import Capture
from basin_lens.errors import StudyError
from basin_lens.scoring.token_rows import row_facts
from basin_lens.texts import Passage


@dataclass(frozen=True)
class Contrast:
    """Two kinds of tokens or texts to be compared: values of a label, or names of spans (`by="span"`).

    Args:
        by: `"span"`, or a label of the passages.
        first, second: two span names, or two values of the label (compared as text, so that `"True"` is True). The difference is
            first - second.

    Example:
        >>> import basin_lens as bl
        >>> bl.studies.Contrast("span", "IO", "S").title
        'span: IO - S'
    """

    by: str
    first: str
    second: str

    @classmethod
    def named(cls, text: str) -> "Contrast":
        """The contrast that `span:IO,S2` or `LABEL:VALUE,VALUE` names.

        Raises:
            StudyError: anything else.
        """
        by, _, sides = text.partition(":")
        first, _, second = sides.partition(",")
        if not (by and first and second):
            raise StudyError(f"expected a contrast such as span:IO,S or memorized:True,False, got {text!r}.")
        return cls(by, first.strip(), second.strip())

    @property
    def title(self) -> str:
        """What is compared, in words."""
        return f"{self.by}: {self.first} - {self.second}"

    def values(self, table: pd.DataFrame) -> pd.Series:
        """Each row's side: `first`, `second`, or None (neither, or spans of both).

        Raises:
            StudyError: a label that the table lacks, or a side without tokens.
        """
        if self.by not in table.columns:
            raise StudyError(f"expected a label of the texts or span as contrast, got {self.by!r}. Give the passages that label.")
        held = table[self.by]
        found = _names if self.by == "span" else _spellings
        one, two = (
            held.map(lambda value, side=side: side in found(value, side)).astype(bool) for side in (self.first, self.second)
        )
        side = pd.Series([None] * len(table), index=table.index, dtype=object)
        side[one & ~two], side[two & ~one] = self.first, self.second
        for name in (self.first, self.second):
            if not (side == name).any():
                there = sorted({str(v) for v in held.dropna().unique() if str(v)})[:8]
                raise StudyError(f"expected tokens with {self.by} = {name!r} for the contrast, got none; there are {there}.")
        return side


def contrasted_first(capture: Capture, contrast: Contrast, most: int | None, seed: int) -> Bool[np.ndarray, " rows"]:
    """The tokens to measure, at most so many (None: all): those of the two kinds, of whole sequences, before any others.

    The others fill up what is left, because tokens are crossed with one another: kinds are to be seen among all tokens.
    """
    able = capture.row_pos.numpy() > 0
    if most is None or int(able.sum()) <= most:
        return able
    sides = contrasted(capture, contrast)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(capture.sequences))
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    # The kinds first, a sequence after the other, then everybody else.
    rank = np.lexsort((rng.random(len(able)), np.where(sides, place[capture.row_seq.numpy()], 0), ~sides, ~able))
    chosen = np.zeros(len(able), bool)
    chosen[rank[:most]] = True
    return chosen & able


def contrasted(capture: Capture, contrast: Contrast) -> Bool[np.ndarray, " rows"]:
    """The tokens of the two kinds that can be measured."""
    rows, labels = row_facts(capture)
    sides = contrast.values(pd.DataFrame({"span": rows["span"], **labels})).notna().to_numpy()
    return sides & (capture.row_pos.numpy() > 0)


def _names(found: object, side: str) -> set[str]:
    """The span asked for, if it is among those of a token, which the table joins by plus signs; a name may hold one itself."""
    return {side} if isinstance(found, str) and f"+{side}+" in f"+{found}+" else set()


def _spellings(found: object, _side: str) -> set[str]:
    """A label's value as text. pandas makes 1 into 1.0 where another text has no value."""
    if found is None or (isinstance(found, float) and np.isnan(found)):
        return set()
    return {str(found)} | ({str(int(found))} if isinstance(found, float) and found.is_integer() else set())


def refuse_label(passages: Sequence[Passage], contrast: Contrast) -> None:
    """Before a model is loaded: what is contrasted must be a label of the texts, or spans."""
    known = sorted({name for passage in passages for name in passage.labels})
    if contrast.by not in ("span", *known):
        raise StudyError(f"expected a label of the texts or span as contrast, got {contrast.by!r}; labels: {known}.")


def refuse_contrast(capture: Capture, contrast: Contrast) -> None:
    """Before the model runs: both sides must be among the tokens chosen."""
    if contrast.first == contrast.second or contrast.by in tables.KEYS:
        raise StudyError(f"expected two different values of a label, or two spans, to contrast, got {contrast.title!r}.")
    rows, labels = row_facts(capture)
    contrast.values(pd.DataFrame({"span": rows["span"], **labels}))
