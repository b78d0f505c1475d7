"""Run the README's first example and photograph its token view: 40 seconds of one core.

`python docs/images/make.py`, with an installed basin_lens and Chromium (Debian package chromium).
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
MARGIN = 12


def photograph(page: Path, picture: Path) -> None:
    """A page as Chromium draws it, without the empty space around it."""
    whole = page.with_suffix(".png")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=900,400",
        "--virtual-time-budget=4000",
    ]
    command = ["chromium", *options, f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={whole}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    image = Image.open(whole).convert("RGB")
    rows, columns = (np.asarray(image) < 250).any(2).nonzero()
    box = (columns.min() - MARGIN, rows.min() - MARGIN, columns.max() + MARGIN, rows.max() + MARGIN)
    image.crop(tuple(int(edge) for edge in box)).quantize(64).save(picture, optimize=True)


def main() -> None:
    readme = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)
    assert example
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(example[1], "README.md", "exec"), {})
        photograph(Path(folder) / "first_look.html", HERE / "first_look.png")


if __name__ == "__main__":
    main()
