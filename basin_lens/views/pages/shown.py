"""One run in a notebook's explorer, without a front end: what may be chosen, what is answered when one asks, a picture."""

import base64
import operator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from basin_lens.errors import TableError
from basin_lens.values import Facts
from basin_lens.views.colored_text import ColoredText, text_picture
from basin_lens.views.pages.page import picture, render
from basin_lens.views.tokens import middle_and_bound, shown_text

_PICTURED = 1500  # tokens of one text; more make a picture that nobody looks at


@dataclass(frozen=True)
class Shown:
    """`data`: from `explorer_data`; `table`: what it was made of."""

    data: Facts
    table: pd.DataFrame

    @cached_property
    def scores(self) -> list[str]:
        """Names, in order."""
        return [score["name"] for score in self.data["scores"]]

    @cached_property
    def keys(self) -> set[tuple[int, int]]:
        """(seq, pos) of every token shown."""
        sequences = [each["seq"] for each in self.data["sequences"] for _ in range(each["length"])]
        return set(zip(sequences, self.data["positions"], strict=True))

    def first(self) -> tuple[str, int]:
        """The score and layer to begin with: those of highest reliability, as the page does."""
        curves = self.data["curves"]
        score = next((place for place, curve in enumerate(curves) if curve["reliability"]), 0)
        known = [(-value, place) for place, value in enumerate(curves[score]["reliability"] or ()) if value is not None]
        layers = self.data["layers"]
        return self.scores[score], layers[min(known)[1] if known else (len(layers) - 1) // 2]

    def score(self, value: object) -> str:
        """The name of a score shown, or a `TableError`."""
        if value not in self.scores:
            raise TableError(f"expected a score of {', '.join(self.scores)}, got {value!r}.")
        return str(value)

    def layer(self, value: object) -> int:
        """The number of a layer shown, or a `TableError`."""
        found = [layer for layer in self.data["layers"] if layer == value and not isinstance(value, bool)]
        if not found:
            raise TableError(f"expected a layer of {', '.join(map(str, self.data['layers']))}, got {value!r}.")
        return int(found[0])

    def token(self, value: object) -> tuple[int, int] | None:
        """(seq, pos) of a token shown, None for none, or a `TableError`."""
        if value is None:
            return None
        try:
            seq, pos = (operator.index(part) for part in value)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise TableError(f"expected a token as (seq, pos), or None, got {value!r}.") from None
        if (seq, pos) not in self.keys:
            raise TableError(f"expected seq and pos of one of the {len(self.keys):,} tokens shown, got ({seq}, {pos}).")
        return seq, pos

    def answer(self, message: object) -> tuple[Facts, list[bytes]]:
        """What a front end asked for, {ask, id, place}: {id, facts} and a buffer for each packed array, or {id, refused}."""
        asked = message if isinstance(message, dict) else {}
        known = {"id": asked.get("id")}
        try:
            match asked.get("ask"):
                case "describe":
                    return {**known, "facts": self._described()}, []
                case "values":
                    facts, buffers = _split([self.data["arrays"][_place(asked, len(self.data["arrays"]))]])
                case "neighbors" if self.data["neighbors"] is not None:
                    place = _place(asked, len(self.data["layers"]))
                    facts, buffers = _split([self.data["neighbors"][name][place] for name in ("rows", "before", "after")])
                case other:
                    raise TableError(f"expected a question for describe, values or neighbors, got {other!r}.")
        except TableError as error:
            return {**known, "refused": str(error)}, []
        return {**known, "facts": facts}, buffers

    def _described(self) -> Facts:
        kept = self.data["neighbors"]
        few = None if kept is None else {key: value for key, value in kept.items() if key not in ("rows", "before", "after")}
        return {**self.data, "arrays": None, "neighbors": few}

    def still(self, token: tuple[int, int] | None, layer: int, score: str, line: str) -> str:
        """The text of the token chosen, else the first, colored by the score, as a picture in a fragment of HTML."""
        seq = self.data["sequences"][0]["seq"] if token is None else token[0]
        rows = self.table[(self.table["seq"] == seq) & (self.table["layer"] == layer)].sort_values("pos")
        values = rows[score].to_numpy(float)
        middle, bound = middle_and_bound(values)
        where = f"{score} at layer {layer}, sequence {seq} ({rows['doc'].iloc[0]})"
        if len(rows) > _PICTURED:
            rows, values = rows[:_PICTURED], values[:_PICTURED]
            where += f", the first {_PICTURED:,} tokens"
        text = ColoredText(where, [shown_text(word) for word in rows["token"]], (values - middle) / bound)
        unit = self.data["scores"][self.scores.index(score)]["unit"]
        ends = f"White is {middle:.3g}, full blue {middle + bound:.3g}, full red {middle - bound:.3g}, in {unit}"
        caption = f"{ends}; gray letters: no score."
        drawn = picture(text_picture([text]), where, caption)
        return str(render("still.html", title=self.data["title"], about=self.data["about"], picture=drawn, line=line))


def _place(asked: Facts, count: int) -> int:
    place = asked.get("place")
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < count:
        raise TableError(f"expected a place below {count:,}, got {place!r}.")
    return place


def _split(packed: list[Facts]) -> tuple[list[Facts], list[bytes]]:
    """Arrays as the page packs them, their bytes apart."""
    facts = [{key: value for key, value in each.items() if key != "data"} for each in packed]
    return facts, [base64.b64decode(each["data"]) for each in packed]
