"""Captures in memory and on disk."""

import basin_lens as bl

C = bl.controls
