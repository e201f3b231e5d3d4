"""From a device to this process's memory."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor itself on a CPU; from a GPU a copy in page-locked memory, where it arrives many
    times as fast as in other memory. It is whole after :func:`wait_for_copies`."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device | str) -> None:
    """Wait for every copy from ``device``."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
