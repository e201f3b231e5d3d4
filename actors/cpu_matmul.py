"""float32 matrix products by oneDNN instead of MKL on AMD processors.

torch computes float32 products with MKL, which uses AVX-512 only on Intel processors. On AMD
processors oneDNN, which is part of torch, is twice as fast (docs/benchmarks.md). torch has no
setting for this: ``torch.backends.mkldnn`` and ``torch.set_float32_matmul_precision`` select oneDNN
only together with a lower precision (TF32 or bfloat16).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPUS = Path("/proc/cpuinfo")
SMALLEST = 2**20
"""Number of multiplications below which torch's own kernel is kept."""
SLICE_ELEMENTS = 2**22
"""Slice size in elements for products that are written to an existing tensor. A slice fits into the
processor's cache."""


@cache
def use_onednn() -> Any:
    """Use oneDNN in this process if it is faster. The caller must keep the result."""
    if (
        CPUS.exists()
        and "AuthenticAMD" in CPUS.read_text()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    ):
        return install()
    return None


def install() -> Any:
    """Replace torch's kernels for the lifetime of the returned library."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the replacement
        for name, kernel in KERNELS.items():
            original = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            kernel = partial(kernel, original)
            library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library


def _mm(original: Callable[..., Tensor], keys: Any, a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b) if _fits(a, b) else original(keys, a, b)


def _mm_out(
    original: Callable[..., Tensor], keys: Any, a: Tensor, b: Tensor, out: Tensor
) -> Tensor:
    if not _fits(a, b, out):
        return original(keys, a, b, out=out)
    for rows, product in _slices(a, b):
        out[rows].copy_(product)
    return out


def _addmm(
    original: Callable[..., Tensor], keys: Any, bias: Tensor, a: Tensor, b: Tensor,
    beta: float = 1, alpha: float = 1,
) -> Tensor:  # fmt: skip
    is_bias = bias.dtype == b.dtype and bias.shape == b.shape[1:] and bias.is_contiguous()
    if not _fits(a, b) or not is_bias or (beta, alpha) != (1, 1):
        return original(keys, bias, a, b, beta=beta, alpha=alpha)
    return _product(a, b, bias)


def _addmm_in_place(
    original: Callable[..., Tensor], keys: Any, total: Tensor, a: Tensor, b: Tensor,
    beta: float = 1, alpha: float = 1,
) -> Tensor:  # fmt: skip
    if not _fits(a, b, total) or (beta, alpha) != (1, 1):
        return original(keys, total, a, b, beta=beta, alpha=alpha)
    for rows, product in _slices(a, b):
        total[rows].add_(product)
    return total


KERNELS: dict[str, Callable[..., Tensor]] = {
    "mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm_": _addmm_in_place
}  # fmt: skip


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = b.t()
    if not (b.is_contiguous() or weight.is_contiguous()):
        weight = weight.contiguous()  # oneDNN is slow for other strides
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    return product


def _slices(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, SLICE_ELEMENTS // b.shape[1])
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        yield rows, _product(a[rows], b)


def _fits(a: Tensor, b: Tensor, out: Tensor | None = None) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.shape[-1] == b.shape[0]
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST
        and (out is None or (out.dtype == a.dtype and out.shape == (len(a), b.shape[1])))
    )
