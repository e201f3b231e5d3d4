"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of a student, in peft's format.

A linear layer computes h = W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]. W and
all other weights of the model are frozen. B is initialized with 0, so that the initial student
equals the model. Engines and the exported student contain the merged weight W + (alpha / rank) B A.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from seqkd.config.student import LoraConfig
from seqkd.errors import ModelError
from seqkd.files import atomic_directory
from seqkd.models.loading import skeleton

ADAPTER = "default"
"""peft's name for the only adapter of a model. It is part of the parameter names."""
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
BASE = ".base_layer"
"""Part of the names of an adapted layer's original parameters."""


def adapted_layers(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Linear]:
    """Return the layers that ``lora`` adapts in a model without adapters, by their full names.
    Raises ModelError if a target does not exist."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    # peft selects layers by the last part of the name, so names of other modules cannot be used.
    others = {_last(name) for name, _ in model.named_modules() if name not in linear}
    names = sorted({_last(name) for name in linear} - others)
    for name in lora.targets if lora.targets != "all-linear" else ():
        if name not in names:
            raise ModelError(
                f"student.lora.targets: {name!r} is not a linear layer of student.model. Its "
                f"linear layers: {', '.join(names) or 'none'}. Use some of them, or set "
                "student.lora.targets to all-linear."
            )
    if not names:
        config: Any = model.config
        raise ModelError(
            f"student.lora.targets: {lora.targets!r} matches no linear layer of a model of type "
            f"{config.model_type!r} except its output head. Remove student.lora."
        )
    wanted = names if lora.targets == "all-linear" else lora.targets
    return {name: layer for name, layer in linear.items() if _last(name) in wanted}


def check_targets(config: Any, lora: LoraConfig) -> None:
    """Raise ModelError unless a model with this transformers config has the target layers. Does not
    read weights."""
    adapted_layers(skeleton(config), lora)


class Adapters:
    """Low-rank adapters, which are inserted into a model."""

    def __init__(self, model: nn.Module, lora: LoraConfig, seed: int) -> None:
        """Insert adapters into ``model``, a loaded causal language model on the CPU.

        Afterwards only the adapters require a gradient. Their initial values depend only on
        ``seed``, so they are the same on every rank.
        """
        from peft import LoraConfig, get_peft_model

        self.scale = lora.alpha / lora.rank
        layers = adapted_layers(model, lora)
        names = sorted({_last(name) for name in layers})
        self.blocks = {_parent(name) for name in layers}
        """Names of the modules that directly contain adapted layers."""
        self.identity = {
            "student.model": f"weights with digest {_digest(model)}",
            "student.lora.rank": str(lora.rank),
            "student.lora.alpha": str(lora.alpha),
            "student.lora.targets": ", ".join(names),
        }
        """Properties that a saved state of the adapters must match, by configuration key."""
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=names, task_type="CAUSAL_LM"
        )
        causal_lm: Any = model
        self.peft = get_peft_model(causal_lm, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if name.endswith(A):
                _initialize(parameter, f"{seed}/{name}")

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge the adapters into the weights.

        Args:
            state: All full (unsharded) parameters of the adapted model, by parameter name.

        Returns:
            Weights of an equivalent model without adapters, by checkpoint name. Products and sums
            are computed in float32 and rounded to the precision of the weight. Tensors of layers
            without adapters are shared with ``state``.
        """
        merged = {}
        for name, weight in state.items():
            layer, is_base, rest = name.partition(BASE)
            if is_base and rest == ".weight":
                product = state[layer + B].float() @ state[layer + A].float()
                weight = (weight.float() + self.scale * product).to(weight.dtype)
            if not name.endswith((A, B)):
                merged[layer + rest] = weight
        return merged

    def published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of :meth:`merged` that an engine with the original model needs.

        It contains all layers of every module with an adapted layer, because engines fuse layers of
        a module (queries, keys and values) into one weight.
        """
        return {n: w for n, w in self.merged(state).items() if _parent(_parent(n)) in self.blocks}

    def export(self, state: Mapping[str, Tensor], directory: Path) -> None:
        """Write only the adapters, in the format that ``peft.PeftModel.from_pretrained(model,
        directory)`` reads. For ``state`` see :meth:`merged`."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        names = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        tensors = get_peft_model_state_dict(self.peft, names, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        config: Any = self.peft.peft_config[ADAPTER]
        with atomic_directory(directory) as partial:
            save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
            config.save_pretrained(partial)


def _initialize(parameter: nn.Parameter, seed: str) -> None:
    """Initialize A with peft's default, uniform within 1 / sqrt(in).

    The values are sampled in float32 for every precision, with a seed that contains the parameter's
    name, so they do not depend on the order of layers, on ranks or on devices.
    """
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    drawn = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn)


def _digest(model: nn.Module) -> str:
    """Return a digest of a model's weights after rounding to bfloat16, which makes it the same in
    both precisions."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        low = parameter.detach().to(torch.bfloat16).contiguous()
        digest.update(low.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
