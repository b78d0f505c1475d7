"""One measurement per file. `ANALYZERS` lists them all; the contract tests runs over it."""

from typing import TYPE_CHECKING

from basin_lens.analyzers.agreement import Agreement
from basin_lens.analyzers.angular_contraction import AngularContraction
from basin_lens.analyzers.attention import AttentionReceived
from basin_lens.analyzers.attention_rollout import AttentionRollout
from basin_lens.analyzers.centroid_effect import CentroidEffect
from basin_lens.analyzers.compression import Compression
from basin_lens.analyzers.contract import (
    Analyzer,
    CloudAnalyzer,
    CloudScore,
    Column,
    Neighborhoods,
    RandomContraction,
    Role,
    RunOn,
    Surroundings,
    TokenAnalyzer,
    total_variance,
)
from basin_lens.analyzers.contraction import Contraction
from basin_lens.analyzers.control import Control
from basin_lens.analyzers.crossed_table import CrossedTable, Crossing, Displaced
from basin_lens.analyzers.directional_contraction import DirectionalContraction
from basin_lens.analyzers.effective_rank_change import EffectiveRankChange
from basin_lens.analyzers.erasure import Erasure
from basin_lens.analyzers.gradient import GradientNorm
from basin_lens.analyzers.gradient_times_activation import GradientTimesActivation
from basin_lens.analyzers.integrated_gradients import IntegratedGradients
from basin_lens.analyzers.jacobian_gain import JacobianGain
from basin_lens.analyzers.jacobian_spectrum import JacobianSpectrum
from basin_lens.analyzers.local_dimension import LocalDimension
from basin_lens.analyzers.matrix_entropy import MatrixEntropy
from basin_lens.analyzers.neighbor_overlap import NeighborOverlap
from basin_lens.analyzers.neighborhood import Neighborhood
from basin_lens.analyzers.next_token_entropy import NextTokenEntropy
from basin_lens.analyzers.raw_compression import RawCompression
from basin_lens.analyzers.relative_contraction import RelativeContraction
from basin_lens.analyzers.seed_compression import SeedCompression
from basin_lens.analyzers.standardized_likelihood import StandardizedLikelihood
from basin_lens.analyzers.state_norm import StateNorm
from basin_lens.analyzers.surprisal import Surprisal
from basin_lens.analyzers.symmetric_contraction import SymmetricContraction
from basin_lens.analyzers.value_weighted_attention import ValueWeightedAttention
from basin_lens.capture import TokenBatch
from basin_lens.values import did_you_mean

ANALYZERS: tuple[type[Analyzer], ...] = (
    Compression,
    Contraction,
    RelativeContraction,
    DirectionalContraction,
    RawCompression,
    SeedCompression,
    SymmetricContraction,
    AngularContraction,
    EffectiveRankChange,
    Neighborhood,
    NeighborOverlap,
    LocalDimension,
    JacobianGain,
    JacobianSpectrum,
    CentroidEffect,
    Surprisal,
    NextTokenEntropy,
    Agreement,
    StandardizedLikelihood,
    StateNorm,
    MatrixEntropy,
    AttentionReceived,
    AttentionRollout,
    ValueWeightedAttention,
    GradientNorm,
    GradientTimesActivation,
    IntegratedGradients,
    Erasure,
)


SAMPLED = 192  # tokens of a layer that the default analyzers cross


def names_of(*roles: Role) -> frozenset[str]:
    """Names of the classes that declare one of these roles, as provenance has them.

    Example:
        >>> from basin_lens.analyzers import names_of
        >>> sorted(names_of("confound"))
        ['Agreement', 'Neighborhood', 'NextTokenEntropy', 'StandardizedLikelihood', 'StateNorm', 'Surprisal']
    """
    every: tuple[type[Analyzer], ...] = (*ANALYZERS, Control)
    return frozenset(cls.__name__ for cls in every if cls.role in roles)


def default_analyzers() -> list[Analyzer]:
    """What `analyze` measures when nothing else is asked for.

    Of `Compression`, which costs as much as dozens of the others, a sample of so many tokens per layer: `Compression()` is of all.
    """
    return [
        Compression(queries=SAMPLED),
        Contraction(),
        RawCompression(),
        Neighborhood(),
        Surprisal(),
        StateNorm(),
    ]


if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> object:
        """Name what was meant by a name that is not here.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"module 'basin_lens.analyzers' has no attribute {name!r}. {did_you_mean(name, __all__)}".rstrip())


__all__ = [
    "ANALYZERS",
    "SAMPLED",
    "Agreement",
    "Analyzer",
    "AngularContraction",
    "AttentionReceived",
    "AttentionRollout",
    "CentroidEffect",
    "Neighborhoods",
    "CloudAnalyzer",
    "CloudScore",
    "Column",
    "Compression",
    "Contraction",
    "CrossedTable",
    "Crossing",
    "DirectionalContraction",
    "Displaced",
    "EffectiveRankChange",
    "Erasure",
    "GradientNorm",
    "GradientTimesActivation",
    "IntegratedGradients",
    "JacobianGain",
    "JacobianSpectrum",
    "LocalDimension",
    "MatrixEntropy",
    "NeighborOverlap",
    "Neighborhood",
    "NextTokenEntropy",
    "RandomContraction",
    "RawCompression",
    "RelativeContraction",
    "Role",
    "RunOn",
    "SeedCompression",
    "StandardizedLikelihood",
    "StateNorm",
    "Surprisal",
    "Surroundings",
    "SymmetricContraction",
    "TokenAnalyzer",
    "TokenBatch",
    "ValueWeightedAttention",
    "default_analyzers",
    "names_of",
    "total_variance",
]
