"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of a student, in peft's form.

A linear layer computes h = W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]; its W,
and every other weight of the model, stays as it is. B is 0 at first, so that the student begins as
the model. Engines, and whoever loads the exported student, get W + (alpha / rank) B A.
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
"""peft's own name for the only adapter of a model; in the names of its parameters."""
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
BASE = ".base_layer"
"""In the names of what an adapted layer had before."""


def adapted_layers(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Linear]:
    """The layers of a model without adapters that ``lora`` adapts, by their whole names; ModelError
    where it names one that is not there."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    # peft goes by the last part of a name, so one that other modules have as well is of no use.
    others = {_last(name) for name, _ in model.named_modules() if name not in linear}
    names = sorted({_last(name) for name in linear} - others)
    for name in lora.targets if lora.targets != "all-linear" else ():
        if name not in names:
            raise ModelError(
                f"student.lora.targets: {name!r} is no linear layer of student.model. It has "
                f"{', '.join(names) or 'none that can be adapted'}. Name some of these, or set "
                "student.lora.targets to all-linear."
            )
    if not names:
        config: Any = model.config
        raise ModelError(
            f"student.lora.targets: {lora.targets!r} finds no linear layer in a model of type "
            f"{config.model_type!r}, but for its output head. Leave student.lora out."
        )
    wanted = names if lora.targets == "all-linear" else lora.targets
    return {name: layer for name, layer in linear.items() if _last(name) in wanted}


def check_targets(config: Any, lora: LoraConfig) -> None:
    """ModelError unless a model with this transformers config has the layers that ``lora`` names;
    its weights are not read."""
    adapted_layers(skeleton(config), lora)


class Adapters:
    """The adapters of one model, which are put into it."""

    def __init__(self, model: nn.Module, lora: LoraConfig, seed: int) -> None:
        """``model`` is a loaded causal language model, on the CPU; only its adapters require a
        gradient afterwards. The same ``seed`` gives the same values, on every rank."""
        from peft import LoraConfig, get_peft_model

        self.scale = lora.alpha / lora.rank
        layers = adapted_layers(model, lora)
        names = sorted({_last(name) for name in layers})
        self.blocks = {_parent(name) for name in layers}
        """The modules that adapted layers are directly in."""
        self.identity = {
            "student.model": f"weights with digest {_digest(model)}",
            "student.lora.rank": str(lora.rank),
            "student.lora.alpha": str(lora.alpha),
            "student.lora.targets": ", ".join(names),
        }
        """What a saved state of the adapters fits, by field of the configuration."""
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=names, task_type="CAUSAL_LM"
        )
        causal_lm: Any = model
        self.peft = get_peft_model(causal_lm, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if name.endswith(A):
                _initialise(parameter, f"{seed}/{name}")

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights of the adapted model, by parameter name -> those of a model without
        adapters that computes the same, by checkpoint name: products and sums in float32, then in
        the precision of the weight. What has no adapter is shared."""
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
        """What of :meth:`merged` an engine needs that has the model: all layers of each module that
        has an adapted one, for engines join some (queries, keys and values) to one weight."""
        return {n: w for n, w in self.merged(state).items() if _parent(_parent(n)) in self.blocks}

    def export(self, state: Mapping[str, Tensor], directory: Path) -> None:
        """Write the adapters alone as ``peft.PeftModel.from_pretrained(model, directory)`` reads
        them; ``state`` as for :meth:`merged`."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        names = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        tensors = get_peft_model_state_dict(self.peft, names, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        config: Any = self.peft.peft_config[ADAPTER]
        with atomic_directory(directory) as partial:
            save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
            config.save_pretrained(partial)


def _initialise(parameter: nn.Parameter, seed: str) -> None:
    """peft's default for A, uniform within 1 / sqrt(in); drawn in float32 whatever the precision,
    by the name alone, so that no order of layers, ranks or devices changes it."""
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    drawn = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn)


def _digest(model: nn.Module) -> str:
    """Of a model's weights, rounded to bfloat16: the same in either precision."""
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
