"""The one jinja2 environment, and what a page is made of: rendered text, data for scripts, pictures.

Every template escapes every value. What stands in a page as markup is a `Markup`, which only this module makes.
"""

import base64
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from basin_lens.files import write_file
from basin_lens.values import Facts

_DPI = 150
_EXPLORER = files("basin_lens.views.pages") / "explorer"
# In the order in which they need one another.
MODULES = ("decode", "scales", "layout", "provider", "dom", "keys", "tokens", "map", "curve", "neighbors", "explorer")
WIDGET_MODULES = (*MODULES, "model", "widget")
_ENVIRONMENT = Environment(
    loader=PackageLoader("basin_lens.views.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
# The oldest browsers that have all that the script uses: `DecompressionStream`; in Chromium, where that is older, `Array.at`.
_NEEDS = "Its script needs Chromium 92, Firefox 113 or Safari 16.4, or a later version."
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


def explorer_script(modules: Iterable[str] = MODULES) -> str:
    """The explorer's modules as one, which a page can hold: their imports of one another left out."""
    texts = [(_EXPLORER / f"{name}.mjs").read_text(encoding="utf-8") for name in modules]
    return re.sub(r"^export (?=\w)", "", re.sub(r"^import .*;\n", "", "\n".join(texts), flags=re.M), flags=re.M)


def widget_script() -> str:
    """The explorer as one module with the `render` that anywidget calls; it brings its own styles."""
    style = json.dumps((_EXPLORER / "explorer.css").read_text(encoding="utf-8"))
    return f"{explorer_script(WIDGET_MODULES)}export default {{render: ({{model, el}}) => mount(model, el, {style})}};\n"


def explorer_page(title: str, data: Facts) -> Report:
    """The explorer with one run's data, in one file. No script runs in it but this one."""
    code = within_script(
        explorer_script()
        + 'const data = JSON.parse(document.getElementById("data").textContent);\n'
        + 'document.querySelector("basin-explorer").open(new PageProvider(data));\n'
    )
    digest = base64.b64encode(hashlib.sha256(str(code).encode()).digest()).decode()
    style = Markup((_EXPLORER / "explorer.css").read_text(encoding="utf-8"))
    return page_of("explorer.html", title=title, data=data, code=code, digest=digest, style=style, needs=_NEEDS)


def picture(figure: Figure, alt: str, caption: str = "") -> Picture:
    """A figure to embed, on white: it can be read on a page of any color."""
    drawn = io.BytesIO()
    # Without the version of matplotlib in the file, the same figure is the same page.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a script that no font here has: boxes stand for it
        figure.savefig(drawn, format="png", dpi=_DPI, metadata={"Software": None}, facecolor="white")
    width, height = (round(96 * side) for side in figure.get_size_inches())
    return Picture(f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}", width, height, alt, caption)
