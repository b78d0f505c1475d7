"""What `analyze` is asked for: checked once, its defaults written once."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, wraps
from typing import Concatenate, ParamSpec, SupportsIndex, TypeVar, get_args

import numpy as np
from torch import Tensor

from basin_lens.analyzers import Analyzer, CloudAnalyzer, TokenAnalyzer, default_analyzers
from basin_lens.analyzers.control import NULLS, controls_of
from basin_lens.capture import Bank, Mask
from basin_lens.errors import NeighborError, TableError
from basin_lens.neighbors import Backend, name_of_choice
from basin_lens.values import Layers, Whole, whole

P = ParamSpec("P")
M = TypeVar("M")
D = TypeVar("D")
R = TypeVar("R")

# What to measure: a list or tuple of analyzers; None: the default ones.
Analyzers = Sequence[Analyzer] | None
# Which tokens to score: a label's or span's name, a number of tokens, positions, or a mask; None: all.
Queries = str | SupportsIndex | Sequence[object] | np.ndarray | Tensor | None


@dataclass(frozen=True)
class Request:
    """The options of `analyze`, which says what each means. Its fields and their defaults are the options of `analyze`.

    Raises:
        TableError: no analyzers, or something else among them.
        AnalyzerError: an analyzer that declares what cannot be.
        NeighborError: an unknown backend, or options of an analyzer that make no sense.
        BasinLensError: a seed that is no whole number, or below 0.

    Example:
        >>> from basin_lens.scoring import Request
        >>> Request(seed=3).chosen[0].columns[0].name
        'compression'
    """

    analyzers: Analyzers = None
    _: KW_ONLY
    layers: Layers = None
    bank: Bank = None
    queries: Queries = None
    controls: bool = False
    backend: Backend = "auto"
    compile: bool = False
    seed: Whole = 0
    max_length: Whole = 128
    batch_size: Whole | None = None
    prepend_bos: bool | None = None
    attention_mask: Mask = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what can be refused without a model, and make the seed an int."""
        object.__setattr__(self, "seed", whole(self.seed, "seed", least=0))
        if self.backend not in get_args(Backend):
            raise NeighborError(f"expected backend in {get_args(Backend)}, got {self.backend!r}.")
        if self.analyzers is not None:
            check_analyzers(self.analyzers)
        self._refuse_choices()

    def _refuse_choices(self) -> None:
        """A choice of one's own looks at every distance, which only the exact search in torch has."""
        own = [a for a in self.analyzers or () if isinstance(a, CloudAnalyzer) and callable(a.choice)]
        if own and self.backend not in ("auto", "torch"):
            raise NeighborError(
                f'expected backend "auto" or "torch" with a choice of one\'s own ({name_of_choice(own[0].choice)}, of '
                f"{own[0].called}), which is shown the distance to every row of the bank, got {self.backend!r}, which finds only "
                "the nearest. Leave the back end out, or measure this analyzer in a run of its own."
            )

    @cached_property
    def chosen(self) -> tuple[Analyzer, ...]:
        """The analyzers asked for (None: the default ones), and behind them their nulls if `controls`."""
        asked = tuple(default_analyzers() if self.analyzers is None else self.analyzers)
        return asked + tuple(controls_of(asked)) if self.controls else asked

    @property
    def nulls(self) -> list[str]:
        """The null baselines that are measured beside the scores, in words."""
        return [f"{choice} neighbors" for choice in NULLS] if self.controls else []


Asked = TypeVar("Asked", bound=Request)


def takes_request(
    request: Callable[P, Asked],
) -> Callable[[Callable[[M, D, Asked], R]], Callable[Concatenate[M, D, P], R]]:
    """A decorator: a function of a model, data and a request becomes one of a model, data and the request's own options.

    For readers, for `help` and for type checkers the options stand in the signature one by one, though they are written in
    `Request` alone.
    """

    def decorate(function: Callable[[M, D, Asked], R]) -> Callable[Concatenate[M, D, P], R]:
        own = inspect.signature(function)
        model, data, _ = own.parameters.values()
        signature = own.replace(parameters=[model, data, *inspect.signature(request).parameters.values()])

        @wraps(function)
        def asked(*args: object, **kwargs: object) -> R:
            bound = signature.bind(*args, **kwargs)
            given_model, given_data, *options = bound.args
            return function(given_model, given_data, request(*options, **bound.kwargs))

        asked.__signature__ = signature  # type: ignore[attr-defined]
        return asked

    return decorate


def check_analyzers(analyzers: object) -> None:
    """Refuse what is no list of analyzers, and what one of them declares wrongly.

    Raises:
        TableError, AnalyzerError, NeighborError: see there.
    """
    if not isinstance(analyzers, list | tuple) or not analyzers:
        raise TableError(f"expected a list of at least one analyzer, got {analyzers!r}. Leave analyzers out for the default ones.")
    for analyzer in analyzers:
        if not isinstance(analyzer, CloudAnalyzer | TokenAnalyzer):
            raise TableError(
                f"expected analyzers (instances, such as Compression(k=15)), got {analyzer!r}. Subclass CloudAnalyzer or "
                "TokenAnalyzer."
            )
        analyzer.check_all()
