"""Pictures as coarse as can be, drawn once each: what they show is tested by the views; here only that they are there."""

import weakref
from io import BytesIO
from pathlib import Path

import pytest

from basin_lens.studies import Contrast
from basin_lens.studies.framework import words
from tests.studies.planted import QUIET, S, made_text, noise, plant_compression, prompts, short_texts, with_importance


@pytest.fixture(scope="package", autouse=True)
def _coarse_pictures():
    """A study saves each figure three times: as PNG, as PDF, in its page."""
    from matplotlib.figure import Figure

    real, drawn = Figure.savefig, weakref.WeakKeyDictionary()

    def savefig(figure, target, **options):
        if figure not in drawn:
            real(figure, picture := BytesIO(), **options | {"dpi": 20, "format": "png"})
            drawn[figure] = picture.getvalue()
        kind = options.get("format") or Path(target).suffix[1:]
        data = drawn[figure] if kind == "png" else f"{kind} of a figure that was drawn".encode()
        target.write(data) if hasattr(target, "write") else Path(target).write_bytes(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


# -- one measurement for all -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def texts():
    return [made_text(48, seed, f"doc-{seed}") for seed in range(18)]


@pytest.fixture(scope="session")
def measured(llama, texts):
    return S.measure(llama, texts, max_length=44, max_sequences=32, integrated=8, **QUIET)


@pytest.fixture(scope="session")
def important(llama, measured):
    return S.study_importance(llama, with_importance(measured, 1), progress=False)


@pytest.fixture(scope="session")
def deep(llama, measured):
    """Compression above both nulls at every layer, most at layer 1."""
    table = measured.table
    apart = (table["compression_isotropic"] - table["compression_random_sets"]).clip(lower=0)
    more = 0.2 + 0.3 * (table["layer"] == 1) + noise(table, 5, 0.1)
    return S.study_layers(llama, plant_compression(measured, apart + more), progress=False)


@pytest.fixture(scope="session")
def spoken(llama, measured):
    """Function words above content words, nouns like verbs."""
    tokens, _ = words.tagged_tokens(measured, "auto")
    values = 1.0 * tokens["tag"].isin(words.FUNCTION) + noise(tokens, 6, 0.3)
    return S.study_linguistic(llama, plant_compression(measured, values), progress=False)


# -- contrasts -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompted(llama):
    return S.measure(
        llama, prompts(), studies=["layers"], layers=[1], max_length=64, unit="template", exclude="template", bank="reference",
        contrast=Contrast("span", "IO", "S"), **QUIET,
    )  # fmt: skip


# -- robustness ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sturdy(llama):
    """An effect in the table only, not in the model: compression above that of random sets."""
    data = short_texts(20, n_words=13)
    held = S.measure(llama, data, studies=["robustness"], layers=[1], max_length=40, **QUIET)
    table = held.table
    planted = plant_compression(held, 1 + noise(table, 0, 0.2))
    return held, S.study_robustness(llama, planted, dtype=None, progress=False)
