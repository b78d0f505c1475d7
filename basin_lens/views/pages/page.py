"""The one jinja2 environment, and what a page is made of: rendered text, data for scripts, pictures.

Every template escapes every value. What stands in a page as markup is a `Markup`, which only this module makes.
"""

import base64
import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from basin_lens.files import write_file

_DPI = 150
_ENVIRONMENT = Environment(
    loader=PackageLoader("basin_lens.views.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
# `tojson` keeps the order of the keys, and refuses NaN, which JSON.parse cannot read. It writes <, >, & and ' as \u003c and so on:
# no text in the data can end its script element or open another.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False}


@dataclass(frozen=True)
class Report:
    """A self-contained page. It carries its data and script, and asks no outside site for anything."""

    html: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, all of it or nothing.

        Raises:
            StoreError: the place cannot be written.
        """
        write_file(path, self.html)


@dataclass(frozen=True)
class Picture:
    """A figure as an image within the page: `source` is a data URI, `width` and `height` are in CSS pixels."""

    source: str
    width: int
    height: int
    alt: str
    caption: str


def page_of(template: str, **values: object) -> Report:
    """A whole page from a template."""
    return Report(str(render(template, **values)))


def render(template: str, **values: object) -> Markup:
    """A part of a page from a template: all values are escaped, save those that are `Markup`."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))


def together(parts: Iterable[Markup]) -> Markup:
    """Parts of a page, or calls within a script, one after another."""
    return Markup("\n").join(parts)


def within_script(code: str) -> Markup:
    """Program text to stand in a script element as it is: CircuitsVis' own, or a call whose data was made harmless before."""
    assert "</script" not in code.lower(), "it would end the script element"
    return Markup(code)


def picture(figure: Figure, alt: str, caption: str = "") -> Picture:
    """A figure to embed, on white: it can be read on a page of any color."""
    drawn = io.BytesIO()
    # Without the version of matplotlib in the file, the same figure is the same page.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a script that no font here has: boxes stand for it
        figure.savefig(drawn, format="png", dpi=_DPI, metadata={"Software": None}, facecolor="white")
    width, height = (round(96 * side) for side in figure.get_size_inches())
    return Picture(f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}", width, height, alt, caption)
