"""One measurement per file. `ANALYZERS` lists them all; the contract tests run over it."""

from basin_lens.analyzers.attention import AttentionReceived
from basin_lens.analyzers.base import (
    Analyzer,
    Cloud,
    CloudAnalyzer,
    CloudScore,
    Column,
    RunOn,
    Surroundings,
    TokenAnalyzer,
    total_variance,
)
from basin_lens.analyzers.compression import Compression
from basin_lens.analyzers.contraction import Contraction
from basin_lens.analyzers.gradient import GradientNorm
from basin_lens.analyzers.matrix_entropy import MatrixEntropy
from basin_lens.analyzers.neighborhood import Neighborhood
from basin_lens.analyzers.raw_compression import RawCompression
from basin_lens.analyzers.seed_compression import SeedCompression
from basin_lens.analyzers.state_norm import StateNorm
from basin_lens.analyzers.surprisal import Surprisal
from basin_lens.capture import TokenBatch

ANALYZERS: tuple[type[Analyzer], ...] = (
    Compression,
    Contraction,
    RawCompression,
    SeedCompression,
    Neighborhood,
    Surprisal,
    StateNorm,
    MatrixEntropy,
    AttentionReceived,
    GradientNorm,
)


def default_analyzers() -> list[Analyzer]:
    """What `analyze` measures when nothing else is asked for."""
    return [
        Compression(),
        Compression(same_token="exclude", name="compression_other_token"),
        Contraction(),
        RawCompression(),
        Neighborhood(),
        Surprisal(),
        StateNorm(),
    ]


__all__ = [
    "ANALYZERS",
    "Analyzer",
    "AttentionReceived",
    "Cloud",
    "CloudAnalyzer",
    "CloudScore",
    "Column",
    "Compression",
    "Contraction",
    "GradientNorm",
    "MatrixEntropy",
    "Neighborhood",
    "RawCompression",
    "RunOn",
    "SeedCompression",
    "StateNorm",
    "Surprisal",
    "Surroundings",
    "TokenAnalyzer",
    "TokenBatch",
    "default_analyzers",
    "total_variance",
]
