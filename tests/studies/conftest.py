"""Pictures as coarse as can be: what they show is tested by the views; here only that they are there."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def _coarse_pictures():
    from matplotlib.figure import Figure

    real = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *given, **options: real(figure, *given, **options | {"dpi": 20}))
        yield
