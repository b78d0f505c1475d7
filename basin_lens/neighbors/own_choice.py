"""Neighbors by the caller's own rule, held to the rules for everyone: who may be whose neighbor, each once, so many."""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.errors import BasinLensError, NeighborError
from basin_lens.neighbors.eligible import Columns, Rules
from basin_lens.neighbors.points import Metric, Points, SameToken

_CELLS = 2**24  # distances that are held at once


class BothSides(NamedTuple):
    """A fact of each query and of each row of the bank: token ids, or positions in the sequence."""

    queries: Int[Tensor, " q"]
    bank: Int[Tensor, " bank"]


# (distances, tokens, positions) -> rows of the bank, k different ones for each query. A distance is infinite where the row may not
# be the query's neighbor; every query has k finite ones. -1: no more neighbors; the query is then left out.
ChoiceFunction = Callable[[Float[Tensor, "q bank"], BothSides, BothSides], Int[Tensor, "q k"]]


def name_of_choice(choice: object) -> str:
    """What provenance calls a choice: a function by its module and name, anything else by what it prints."""
    if isinstance(choice, str):
        return choice
    named = getattr(choice, "__qualname__", None)
    if named is not None:
        return f"{getattr(choice, '__module__', '?')}.{named}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(choice))


def check_choice(choice: ChoiceFunction, kind: str) -> None:
    """Refuse, before any work, a choice that cannot be called with three arguments, or not be compared with others.

    Raises:
        NeighborError: see there. `kind`: of the analyzer, for the message.
    """
    wanted = f"expected a choice (distances, tokens, positions) -> rows for {kind}, got"
    try:
        hash(choice)
    except TypeError as error:
        raise NeighborError(
            f"{wanted} {name_of_choice(choice)}, which has no hash, so that equal ones cannot share a search. Use a function, or a "
            "frozen dataclass with __call__."
        ) from error
    try:
        inspect.signature(choice).bind(None, None, None)
    except TypeError as error:
        raise NeighborError(
            f"{wanted} {name_of_choice(choice)}, which does not take three arguments ({error}). A function that is a class "
            "attribute needs staticmethod(...)."
        ) from error
    except ValueError:  # some built-in functions do not tell their arguments
        pass


def own_sets(
    choose: ChoiceFunction,
    queries: Points,
    bank: Points,
    positions: BothSides,
    k: int,
    *,
    metric: Metric = "l2",
    same_token: SameToken = "any",
    distinct: bool = True,
) -> Int[Tensor, "queries k"]:
    """k rows of the bank for each query as a function chooses them; -1 where fewer may be its neighbors, or fewer were chosen.

    Args:
        choose: see `ChoiceFunction`. It is called with some of the queries at a time, in their order, and is to choose for each by
            itself. A query with fewer than k possible neighbors is not shown to it.
        queries, bank, k, metric, same_token, distinct: as for `find`; who may be whose neighbor is decided as there.
        positions: of the queries and of the bank's rows.

    Raises:
        NeighborError: the function failed, or its rows are no whole numbers `[q, k]`, not in the bank, not allowed, or chosen
            twice.

    Example:
        >>> import torch
        >>> from basin_lens.neighbors import BothSides, Points, own_sets
        >>> states = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> points = Points(states, torch.arange(4), torch.zeros(4).long(), torch.full((4,), -1), torch.ones(4).bool())
        >>> def second(distances, tokens, positions):
        ...     return distances.argsort(1)[:, 1:2]
        >>> own_sets(second, points, points, BothSides(torch.arange(4), torch.arange(4)), 1).squeeze(1).tolist()
        [2, 2, 0, 1]
    """
    bank = bank.under(metric)
    columns = Columns.of(bank, distinct)
    rules = Rules.of(queries, columns, same_token)
    rows = torch.full((len(queries.key), k), -1, dtype=torch.int64, device=queries.states.device)
    every = torch.arange(len(columns.rows), device=rows.device)[None]
    defined = queries.defined(metric)
    for part in torch.arange(len(rows), device=rows.device).split(max(1, _CELLS // max(1, len(bank.key)))):
        able = ~rules.excluded(part, every) & defined[part, None]
        enough = able.sum(1) >= k
        at, able = part[enough], able[enough]
        if not len(at):
            continue
        allowed = torch.zeros(len(at), len(bank.key), dtype=torch.bool, device=rows.device)
        allowed[:, columns.rows] = able
        distances = _distances(queries.states[at], bank.states, metric).masked_fill_(~allowed, torch.inf)
        tokens = BothSides(queries.token[at], bank.token)
        try:
            chosen = choose(distances, tokens, BothSides(positions.queries[at], positions.bank))
        except BasinLensError:
            raise
        except Exception as error:
            raise NeighborError(
                f"expected rows from the choice {name_of_choice(choose)}, got {type(error).__name__} in its own code: {error}. The "
                "first traceback shows the line."
            ) from error
        rows[at] = _checked(chosen, allowed, k, name_of_choice(choose))
    return rows


def _distances(queries: Float[Tensor, "q d"], bank: Float[Tensor, "bank d"], metric: Metric) -> Float[Tensor, "q bank"]:
    """By differences, not by products, which lose digits between near states."""
    if metric == "cosine":
        # Half the squared distance of the directions is 1 - cosine.
        queries, bank = (torch.nn.functional.normalize(states, dim=1, eps=0.0).nan_to_num_(0.0) for states in (queries, bank))
    apart = torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square() / 2 if metric == "cosine" else apart


def _checked(chosen: object, allowed: Bool[Tensor, "q bank"], k: int, name: str) -> Int[Tensor, "q k"]:
    """What a function chose, if it may."""
    q, count = allowed.shape
    if not isinstance(chosen, Tensor) or chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        got = f"a tensor of {chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise NeighborError(f"expected rows of the bank as a tensor of whole numbers from the choice {name}, got {got}.")
    if chosen.shape != (q, k):
        raise NeighborError(
            f"expected rows [q, k] = {[q, k]} from the choice {name}, got {list(chosen.shape)}. Choose exactly k rows for each "
            "query; -1 where there are no more."
        )
    chosen = chosen.to(allowed.device, torch.int64)
    if bool(((chosen < -1) | (chosen >= count)).any()):
        raise NeighborError(
            f"expected rows from 0 to {count - 1} (or -1, none) from the choice {name}, got {int(chosen.min())} to "
            f"{int(chosen.max())}."
        )
    there = chosen >= 0
    refused = there & ~allowed.gather(1, chosen.clamp_min(0))
    if bool(refused.any()):
        raise NeighborError(
            f"expected rows that may be the query's neighbors from the choice {name}, got {int(refused.sum())} that may not (of "
            "its own sequence, at position 0, a duplicate, ...; see exclude, same_token, position_0). Take rows of finite distance."
        )
    ordered = chosen.sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise NeighborError(
            f"expected different rows for each query from the choice {name}, got the same row twice. Take each once."
        )
    return chosen
