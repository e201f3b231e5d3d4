"""Depth pruning of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from seqkd.config.student import PruneInitConfig
from seqkd.errors import ModelError


def check_prune(config: Any, init: PruneInitConfig) -> None:
    """Raise ModelError unless some, but not all, layers of a model with ``config`` are dropped."""
    first, last = init.drop_layers
    layers = config.num_hidden_layers
    if last > layers or last - first >= layers:
        raise ModelError(
            f"student.init.drop_layers: [{first}, {last}] must drop some, but not all, of the "
            f"model's {layers} layers. Set it to a smaller range within [0, {layers}]."
        )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of any causal language model, which are the modules that
    transformers never splits across devices."""
    names: Any = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def prune(model: nn.Module, init: PruneInitConfig) -> None:
    """Drop decoder layers [first, last) of a loaded model, in place."""
    first, last = init.drop_layers
    config: Any = model.config
    check_prune(config, init)
    layers: Any = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ModelError(
            f"student.init.kind: 'prune' does not support models of type {config.model_type!r}. "
            "Set it to checkpoint and student.model to a pruned model."
        )
    kept = nn.ModuleList(layer for i, layer in enumerate(layers) if not first <= i < last)
    for index, layer in enumerate(kept):
        module: Any
        for module in layer.modules():  # layer_idx selects the layer's entry in the KV cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.base_model.layers = kept  # type: ignore[union-attr]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [t for i, t in enumerate(config.layer_types) if not first <= i < last]
