"""How much memory a piece of work takes, tensor by tensor."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Memory:
    """Bytes of tensors that were made inside the block: `now`, and the most at one time, `peak`."""

    now: int = 0
    peak: int = 0


@contextmanager
def counting_memory() -> Iterator[Memory]:
    """Count the tensors that are made inside the block while they live, on whatever device; what was there before is not counted.

    The same number each time, unlike the memory of the process. What one operation takes for itself until it is done is not seen,
    nor are arrays of numpy. Slow: a call of Python for every operation, so nothing inside should be timed.

    Example:
        >>> import torch
        >>> from basin_lens.model import counting_memory
        >>> with counting_memory() as memory:
        ...     kept = (torch.ones(1000) + torch.ones(1000)) * 2
        >>> memory.now, memory.peak
        (4000, 12000)
    """
    memory = Memory()
    with _Counting(memory):
        yield memory


class _Counting(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        # A view, or a result written into an argument, is no new memory: its storage was counted, or is older than the block.
        old = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in old and leaf.untyped_storage() not in self.seen:
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, memory = storage.nbytes(), self.memory
        self.seen.add(storage)
        weakref.finalize(storage, self._free, size).atexit = False
        memory.now += size
        memory.peak = max(memory.peak, memory.now)

    def _free(self, size: int) -> None:
        self.memory.now -= size
