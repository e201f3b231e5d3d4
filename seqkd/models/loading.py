"""Loading of models, configs and tokenizers in transformers' format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqkd.errors import ModelError
from seqkd.imports import importing


def dtype_of(precision: str) -> torch.dtype:
    """Return the torch dtype of a precision, for example torch.float32 for "float32"."""
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_config(model: str, field: str) -> Any:
    """Return the transformers config of any model. Raises ModelError with ``field`` if it cannot be
    loaded."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    looks_local = path.is_absolute() or model.startswith((".", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        state = "has no config.json" if path.is_dir() else "does not exist"
        raise ModelError(
            f"{field}: {model!r} {state}. Set it to a directory written by save_pretrained, or to "
            "a hub name."
        )
    try:
        name = str(path) if looks_local else model
        # If unset, transformers asks at the terminal whether to run the model's own code.
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{field}: {model!r} cannot be loaded: {first_line(error)} Set it to a directory "
            "written by save_pretrained, or to a hub name that this machine can access."
        ) from None


def load_config(model: str, field: str) -> Any:
    """Return the transformers config of a causal language model. Raises ModelError with ``field``
    for any other model."""
    with importing():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(model, field)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{field}: {model!r} is of type {config.model_type!r}, which is not a causal language "
            "model. Set it to a model that transformers' AutoModelForCausalLM can load."
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    saved = config.architectures or []
    if saved and not {architecture} & set(saved):
        raise ModelError(
            f"{field}: {model!r} was saved as {saved[0]}, which has no language-model head. Set it "
            f"to a checkpoint of {architecture}."
        )
    return config.get_text_config()


def load_tokenizer(model: str, field: str) -> Any:
    """Load the model's tokenizer. Raises ModelError with ``field`` if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(expand(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{field}: the tokenizer of {model!r} cannot be loaded: {first_line(error)} Add the "
            "tokenizer's files to the model."
        ) from None


def expand(model: str) -> str:
    """Replace a leading ~ by the home directory. Hub names are not changed."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_causal_lm(
    model: str, precision: str, field: str, device_map: str | None = None
) -> nn.Module:
    """Load a causal language model in ``precision`` and in evaluation mode, on the CPU or by
    accelerate's ``device_map``. Raises ModelError with ``field`` if weights are missing."""
    with importing():
        from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, info = load(
        expand(model),
        dtype=dtype_of(precision),
        use_safetensors=True,
        output_loading_info=True,
        device_map=device_map,
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{field}: {model!r} has no weights for {missing[0]} and {len(missing) - 1} other "
            "parameters, which would be random. Set it to a complete checkpoint."
        )
    assert isinstance(loaded, nn.Module)
    return loaded.eval()


def skeleton(config: Any) -> nn.Module:
    """Build a causal language model from a transformers config without weights, with its tensors on
    the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return built


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in place. With dropout, the trained model would differ
    from the model that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def end_of_sequence_ids(model: str, tokenizer: Any, field: str) -> tuple[int, ...]:
    """Return the token ids that end a completion: those of the generation config, followed by the
    tokenizer's."""
    generation = generation_config(model)
    eos = generation and generation.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    stop_ids = dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
    if not stop_ids:
        raise ModelError(
            f"{field}: {model!r} has no end-of-sequence token. Set eos_token_id in its "
            "generation_config.json."
        )
    return tuple(stop_ids)


def generation_config(model: str) -> Any:
    """Load the model's generation_config.json. Return None if there is none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(expand(model))
    except OSError:
        return None


def save_generation_config(config: Any, directory: Path) -> None:
    """Write generation_config.json unchanged. transformers' ``save_pretrained`` rejects values that
    some published models have, such as a temperature without do_sample."""
    config.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])


def first_line(error: Exception) -> str:
    """Return the first non-empty line of a library's error message, ending with a period."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return line if line.endswith(".") else line + "."
