"""Text <-> few bytes, with the model's predictions; without loss.

    bytes -> tokens -> streams -> [model, one step] -> integer frequencies -> range coder -> chunks -> file
                                                    or exact ranks         -> rank coder

- `text.py`: `TextCodec`: encode, decode, estimate, ranks. Read it first
- `lockstep.py`: the streams' walk, the same in both directions; the probe
- `probabilities.py`, `ranks.py`: from logits to whole numbers
- `entropy.py`, `rank_coders.py`: from whole numbers to bytes
- `container.py`: the file format
- `reading.py`: one full pass, for estimates and tables
- `benchmark.py`: beside general compressors
"""

from basin_lens.codec.benchmark import bench, growth
from basin_lens.codec.container import Container, Setting, read, store
from basin_lens.codec.rank_coders import RANK_CODERS
from basin_lens.codec.reading import Estimate
from basin_lens.codec.text import TextCodec

__all__ = ["RANK_CODERS", "Container", "Estimate", "Setting", "TextCodec", "bench", "growth", "read", "store"]
