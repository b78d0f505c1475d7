"""What the tests of figures read off them, and a table to draw."""

import numpy as np
import pandas as pd

NASTY = ["</script><b>bold</b><script>", "<img src=x onerror=a(2)>\r\nline\ttwo <!-- -->"]
WHOLE = "</script><b>bold</b><script>alert(1)</script><!--"  # as one token, as a vocabulary may hold it
UNITS = {"compression": "nats", "state_norm": "activation units", "importance": "share"}


def tokens(layers: int = 4, docs: int = 8, length: int = 20, seed: int = 0) -> pd.DataFrame:
    """A table of two sequences per document; compression has both signs and no value at position 0."""
    rng = np.random.default_rng(seed)
    seq = np.repeat(np.arange(2 * docs), length)
    size = len(seq)
    one = pd.DataFrame(
        {
            "run": "r", "doc": [f"doc-{s // 2}" for s in seq], "seq": seq, "pos": np.tile(np.arange(length), 2 * docs),
            "token_id": rng.integers(0, 50, size), "token": "x", "tag": rng.choice(["NOUN", "VERB", "PRP$"], size, p=[0.5, 0.3, 0.2]),
            "importance": rng.lognormal(size=size),
        }
    )  # fmt: skip
    parts = []
    for layer in range(layers):
        values = rng.normal(size=size) + 0.5 * np.log(one.importance)
        norm = rng.lognormal(3, 0.2, size) * np.where(one.pos == 0, 100, 1)
        parts.append(one.assign(layer=layer, compression=np.where(one.pos == 0, np.nan, values), state_norm=norm))
    table = pd.concat(parts, ignore_index=True)
    table.attrs["provenance"] = {"r": {"columns": {name: {"unit": unit} for name, unit in UNITS.items()}}}
    return table


def lines(axes, gid: str) -> list:
    return [line for line in axes.lines if line.get_gid() == gid]


def intervals(axes) -> np.ndarray:
    return np.concatenate([c.get_segments() for c in axes.collections if c.get_gid() == "interval"])


def caption(figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def painted(figure) -> None:
    """Everything can be drawn, and no letter is smaller than 8 points."""
    figure.draw_without_rendering()
    sizes = [text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if text.get_text().strip()]
    assert min(sizes) >= 8
