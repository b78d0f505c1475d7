"""What is learned, and when it is not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that need no gradient meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
