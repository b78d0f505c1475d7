"""One run for the pages and views that show it."""

import pytest

import basin_lens as bl
from basin_lens.scoring import Request, score
from tests.conftest import TEXTS
from tests.views.drawn import NASTY


@pytest.fixture(scope="session")
def run(llama):
    headline = bl.analyzers.Compression(k=5)
    passed = bl.analyzers.Contraction(k=5)  # its neighbors pass themselves, so that they have distances behind the block
    scores = [headline, passed, bl.analyzers.RawCompression(k=5), bl.analyzers.Neighborhood(k=5), bl.analyzers.Surprisal()]
    return score(llama, [*TEXTS, *NASTY], Request(scores, progress=False), keep_neighbors_of=passed)
