"""The former name of `basin_lens.scoring`, kept for one version."""

from basin_lens.scoring import Analysis, analyze, neighborhood, score

__all__ = ["Analysis", "analyze", "neighborhood", "score"]
