"""Products of float32 matrices on CPU cores, by oneDNN where MKL is the slower one.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone: on AMD's,
oneDNN is twice as fast (docs/benchmarks.md). It is part of torch, and what vLLM multiplies with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPUS = Path("/proc/cpuinfo")
"""Where Linux says whose processor this is."""
SMALLEST = 2**20
"""Multiplications below which it does not matter who makes them."""
SLICE_ELEMENTS = 2**22
"""Of a product that goes to where a tensor is already, what is formed at a time: in its cache."""


@cache
def use_onednn() -> Any:
    """From here on in this process, where that is faster. What is returned keeps it so."""
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
    """Put oneDNN's kernels before torch's for as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there were kernels before
        for name, ours in KERNELS.items():
            torchs = torch.library.get_kernel(f"aten::{name}", "CPU")
            kernel = partial(ours, torchs.call_boxed)
            library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library


def _mm(torchs: Callable[..., Tensor], keys: Any, a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b) if _fits(a, b) else torchs(keys, a, b)


def _mm_out(torchs: Callable[..., Tensor], keys: Any, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if not _fits(a, b) or not _takes(out, a, b):
        return torchs(keys, a, b, out=out)
    for rows, product in _slices(a, b):
        out[rows].copy_(product)
    return out


def _addmm(
    torchs: Callable[..., Tensor], keys: Any, to: Tensor, a: Tensor, b: Tensor,
    beta: float = 1, alpha: float = 1,
) -> Tensor:  # fmt: skip
    if not _fits(a, b) or not _is_bias(to, b) or (beta, alpha) != (1, 1):
        return torchs(keys, to, a, b, beta=beta, alpha=alpha)
    return _product(a, b, to)


def _addmm_in_place(
    torchs: Callable[..., Tensor], keys: Any, to: Tensor, a: Tensor, b: Tensor,
    beta: float = 1, alpha: float = 1,
) -> Tensor:  # fmt: skip
    if not _fits(a, b) or not _takes(to, a, b) or (beta, alpha) != (1, 1):
        return torchs(keys, to, a, b, beta=beta, alpha=alpha)
    for rows, product in _slices(a, b):
        to[rows].add_(product)
    return to


def _addmm_out(
    torchs: Callable[..., Tensor], keys: Any, to: Tensor, a: Tensor, b: Tensor,
    beta: float = 1, alpha: float = 1, *, out: Tensor,
) -> Tensor:  # fmt: skip
    if not _fits(a, b) or not _is_bias(to, b) or not _takes(out, a, b) or (beta, alpha) != (1, 1):
        return torchs(keys, to, a, b, beta=beta, alpha=alpha, out=out)
    for rows, product in _slices(a, b, to):
        out[rows].copy_(product)
    return out


KERNELS: dict[str, Callable[..., Tensor]] = {
    "mm": _mm,
    "mm.out": _mm_out,
    "addmm": _addmm,
    "addmm_": _addmm_in_place,
    "addmm.out": _addmm_out,
}


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = b.t()
    if not (b.is_contiguous() or weight.is_contiguous()):
        weight = weight.contiguous()  # oneDNN is slow where neither lies together
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    return made


def _slices(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, SLICE_ELEMENTS // b.shape[1])
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        yield rows, _product(a[rows], b, bias)


def _fits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.shape[-1] == b.shape[0]
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST
    )


def _takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    return out.dtype == torch.float32 and out.shape == (a.shape[0], b.shape[1])


def _is_bias(to: Tensor, b: Tensor) -> bool:
    return to.dtype == torch.float32 and to.shape == (b.shape[1],) and to.is_contiguous()
