"""Copies from a device to host memory."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory. A CPU tensor is returned without a copy. A GPU tensor is
    copied asynchronously to page-locked memory, which is many times as fast as other memory. The
    copy is complete after :func:`wait_for_copies`."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device | str) -> None:
    """Wait for all copies from ``device``."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
