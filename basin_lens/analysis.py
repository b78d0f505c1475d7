"""The former name of `basin_lens.scoring`, kept for one version."""

from basin_lens.scoring import analyze, neighborhood

__all__ = ["analyze", "neighborhood"]
