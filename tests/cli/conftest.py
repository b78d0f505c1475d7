"""Reports are drawn coarse here, too."""

from tests.studies.conftest import _coarse_pictures  # noqa: F401 - a fixture for every test
