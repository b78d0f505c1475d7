"""What an analyzer's own code gives back: its failures carry its name, and its values are those that it declares."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from basin_lens.errors import AnalyzerError, BasinLensError


@contextmanager
def own_code(whose: str, layer: int, needs: Iterable[str]) -> Iterator[None]:
    """Whatever fails inside is said to be of this analyzer, at this layer.

    What the package refuses itself, and a lack of memory, keep their class and get a note: callers may act on them.

    Raises:
        AnalyzerError: in place of any other error, which is its cause.
    """
    try:
        yield
    except (BasinLensError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        error.add_note(f"In measure of {whose}, at layer {layer}.")
        raise
    except Exception as error:
        raise AnalyzerError(
            f"expected values of {whose} at layer {layer}, got {type(error).__name__} in its own measure: {error}. The first "
            f"traceback shows the line. It is given what it needs and no more: {', '.join(sorted(needs)) or 'nothing'}."
        ) from error


def check_returned(whose: str, layer: int, values: object, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse values other than one real tensor of a right shape for each declared column. `shapes`: the right ones, by their names.

    Raises:
        AnalyzerError: with the column, what was expected and what came.
    """
    wanted = sorted(names)
    if not isinstance(values, Mapping):
        raise AnalyzerError(
            f"expected measure of {whose} to return a dict of tensors by column name, got {type(values).__name__} at layer "
            f"{layer}. Return {{{wanted[0]!r}: values}}."
        )
    if set(values) != set(wanted):
        raise AnalyzerError(
            f"expected measure of {whose} to give the columns that it declares, {', '.join(wanted)}, got "
            f"{', '.join(sorted(map(str, values))) or 'none'} at layer {layer}. Let columns and measure name the same."
        )
    said = " or ".join(f"{words} = {list(shape)}" for words, shape in shapes.items())
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise AnalyzerError(
                f"expected column {name!r} of {whose} as a tensor {said}, got {type(value).__name__} at layer {layer}. Use "
                "torch.as_tensor."
            )
        if value.is_complex():
            raise AnalyzerError(
                f"expected real numbers in column {name!r} of {whose}, got {value.dtype} at layer {layer}. Use .abs()."
            )
        if tuple(value.shape) not in shapes.values():
            raise AnalyzerError(
                f"expected column {name!r} of {whose} of shape {said}, got {list(value.shape)} at layer {layer}. Give one number "
                "for each, NaN where it is not defined."
            )
