"""Full precision, whatever the caller has switched on: no autocast, float32 products in float32, float32 as default type."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")  # kinds that autocast may be on for
_FULL = ("ieee", "none")


@contextmanager
def full_precision() -> Iterator[None]:
    """Numbers as the model's own type gives them, put back after.

    An `autocast` around a measurement would compute a float32 model in bfloat16, and so would
    `set_float32_matmul_precision("medium")`, while the table says float32. A default type other than float32 would round what is
    kept.
    """
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32_products())
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        yield


@contextmanager
def _float32_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9: one setting for all
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    lowered = [(backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in _FULL]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision
