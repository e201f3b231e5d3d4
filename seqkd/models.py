"""Models and tokenizers in transformers' format: loading, output heads, depth pruning, export."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from seqkd.config.student import PruneInitConfig, StudentConfig
from seqkd.errors import ModelError
from seqkd.heads import OutputHead


def dtype_of(precision: str) -> torch.dtype:
    """ "float32" -> torch.float32."""
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_config(model: str, field: str) -> Any:
    """transformers config of any model; ModelError names ``field`` where there is none."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    looks_local = path.is_absolute() or model.startswith((".", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        state = "has no config.json" if path.is_dir() else "does not exist"
        raise ModelError(
            f"{field}: {model!r} {state}. Name a directory that save_pretrained wrote, or a hub "
            "name."
        )
    try:
        name = str(path) if looks_local else model
        # Without an answer transformers asks at the terminal whether to run the model's own code.
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{field}: {model!r} cannot be loaded: {first_line(error)} Name a directory that "
            "save_pretrained wrote, or a hub name that this machine can reach."
        ) from None


def load_config(model: str, field: str) -> Any:
    """transformers config of a causal language model; ModelError names ``field`` otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(model, field)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{field}: {model!r} is of type {config.model_type!r}, which is no causal language "
            "model. Name one that transformers' AutoModelForCausalLM loads."
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    saved = config.architectures or []
    if saved and not {known} & set(saved):
        raise ModelError(
            f"{field}: {model!r} was saved as {saved[0]}, which has no language-model head that "
            f"fits {known}. Name a checkpoint of {known}."
        )
    return config.get_text_config()


def load_tokenizer(model: str, field: str) -> Any:
    """The model's tokenizer; ModelError names ``field`` where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(expand(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{field}: the tokenizer of {model!r} cannot be loaded: {first_line(error)}"
        ) from None


def expand(model: str) -> str:
    """A leading ~ replaced by the home directory; hub names stay as they are."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_causal_lm(
    model: str, precision: str, field: str, device_map: str | None = None
) -> nn.Module:
    """The model's weights in ``precision``, in evaluation mode, on the CPU or as accelerate's
    ``device_map`` says; ModelError names ``field`` where some are missing."""
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
            f"{field}: {model!r} has no weights for {missing[0]} and {len(missing) - 1} others; "
            "they would be random. Name a complete checkpoint."
        )
    assert isinstance(loaded, nn.Module)
    return loaded.eval()


def skeleton(config: Any) -> nn.Module:
    """The architecture of a causal language model with this transformers config, without weights:
    its tensors are on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return built


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in place: the model that learns is the one that
    sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def end_of_sequence_ids(model: str, tokenizer: Any, field: str) -> tuple[int, ...]:
    """Token ids that end a completion: generation_config's, then the tokenizer's."""
    found = generation_config(model)
    eos = found and found.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    known = dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
    if not known:
        raise ModelError(
            f"{field}: {model!r} names no end-of-sequence token. Set eos_token_id in its "
            "generation_config.json."
        )
    return tuple(known)


def generation_config(model: str) -> Any:
    """The model's generation_config.json; None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(expand(model))
    except OSError:
        return None


def save_generation_config(config: Any, directory: Path) -> None:
    """Write generation_config.json as it is: transformers' own ``save_pretrained`` refuses what
    some published models have (a temperature without do_sample)."""
    config.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])


# --- output heads


def head_of(model: nn.Module) -> OutputHead:
    """The output head of a loaded model, sharing its tensors."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    return OutputHead(layer.weight, getattr(layer, "bias", None), **_logit_options(model.config))


def load_head(model: str, precision: str) -> OutputHead:
    """Only the output head of a checkpoint: the teacher's, frozen, for the learner."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    config = load_config(model, "teacher.model")
    files = _safetensors_index(expand(model), cached_file)
    # A tied checkpoint stores the matrix once, under the name of the embedding.
    ends = ("lm_head.weight", *(("embed_tokens.weight",) if config.tie_word_embeddings else ()))
    name = next((n for end in ends for n in files if n.endswith(end)), None)
    if name is None:
        raise ModelError(
            f"teacher.model: {model!r} has no {' or '.join(ends)} in its safetensors files. Set "
            "teacher.kind to hf and teacher.scores to logprobs."
        )
    bias_name = name.removesuffix("weight") + "bias"
    tensors = {}
    for wanted in (name, bias_name):
        if wanted in files:
            with safe_open(files[wanted], framework="pt") as reader:
                tensors[wanted] = reader.get_tensor(wanted).to(dtype_of(precision))
    return OutputHead(tensors[name], tensors.get(bias_name), **_logit_options(config))


def export_head(model: str, precision: str, directory: Path) -> None:
    """Write a model directory with configuration, tokenizer and the output head alone: what the
    learner and the checks read of a teacher."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    AutoConfig.from_pretrained(expand(model)).save_pretrained(directory)
    load_tokenizer(model, "teacher.model").save_pretrained(directory)
    if (generation := generation_config(model)) is not None:
        save_generation_config(generation, directory)
    head = load_head(model, precision)
    tensors = {"lm_head.weight": head.weight}
    if head.bias is not None:
        tensors["lm_head.bias"] = head.bias
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def checkpoint_digest(model: str, download: bool) -> str | None:
    """A hash of a checkpoint's configuration and every byte of its weights. Where it is not on
    this machine it is fetched if ``download`` says so, else None."""
    from transformers.utils.hub import cached_file

    def find(model: str, name: str, **options: Any) -> str | None:
        return cached_file(model, name, local_files_only=not download, **options)

    try:
        if download:
            load_config(model, "teacher.model")
        config = find(expand(model), "config.json")
        files = _safetensors_index(expand(model), find)
    except (OSError, ModelError):
        if download:
            raise
        return None
    digest = xxhash.xxh3_128()
    for file in (config, *sorted(set(files.values()))):
        assert file is not None
        with open(file, "rb") as reader:
            while block := reader.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _safetensors_index(model: str, cached_file: Any) -> dict[str, str]:
    """Parameter name -> file, for a single or a sharded checkpoint."""
    from safetensors import safe_open

    index = cached_file(
        model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        shards = {shard: cached_file(model, shard) for shard in set(weight_map.values())}
        return {name: shards[shard] for name, shard in weight_map.items()}
    single = cached_file(model, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise ModelError(f"teacher.model: {model!r} has no safetensors weights. Convert it first.")
    with safe_open(single, framework="pt") as reader:
        return dict.fromkeys(reader.keys(), single)


def _logit_options(config: Any) -> dict[str, Any]:
    """What model families do to their logits after the matrix (Cohere, Granite, Gemma)."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return {
        "scale": float(scale) if scale else 1.0 / float(divisor) if divisor else 1.0,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def check_prune(config: Any, init: PruneInitConfig) -> None:
    """ModelError unless ``init`` leaves a part of the layers of a model with ``config``."""
    first, last = init.drop_layers
    layers = config.num_hidden_layers
    if last > layers or last - first >= layers:
        raise ModelError(
            f"student.init.drop_layers: [{first}, {last}) does not leave a part of the model's "
            f"{layers} layers. Choose a range within [0, {layers}]."
        )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of any causal language model: what transformers never parts."""
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
            f"student.init.kind: 'prune' does not know where a model of type "
            f"{config.model_type!r} keeps its layers. Use kind checkpoint with a pruned model."
        )
    kept = nn.ModuleList(layer for i, layer in enumerate(layers) if not first <= i < last)
    for index, layer in enumerate(kept):
        module: Any
        for module in layer.modules():  # the key-value cache is addressed by this index
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.base_model.layers = kept  # type: ignore[union-attr]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [t for i, t in enumerate(config.layer_types) if not first <= i < last]


def materialise_student(student: StudentConfig, precision: str, directory: Path) -> str:
    """The path of the initial student that engines and ranks load: the model itself, or
    ``directory`` once the initialisation has been written there."""
    if not isinstance(student.init, PruneInitConfig):
        return expand(student.model)
    model = load_causal_lm(student.model, precision, "student.model")
    prune(model, student.init)
    export(model, None, directory, expand(student.model))
    return str(directory)


def export(
    model: nn.Module, state: dict[str, Tensor] | None, directory: Path, tokenizer_from: str
) -> None:
    """Write a directory that transformers and vLLM load as it is: weights (safetensors), config,
    tokenizer and chat template, and the generation config of ``tokenizer_from`` with what ends a
    completion here."""
    from transformers import GenerationConfig

    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = load_tokenizer(tokenizer_from, "student.model")
    # The source's, if any, is written below.
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    model.save_pretrained(partial, **({"state_dict": state} if state is not None else {}))  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    generation = generation_config(tokenizer_from) or GenerationConfig()
    stop_ids = end_of_sequence_ids(tokenizer_from, tokenizer, "student.model")
    generation.eos_token_id = list(stop_ids)
    if generation.pad_token_id is None:
        pad = tokenizer.pad_token_id
        generation.pad_token_id = stop_ids[0] if pad is None else pad
    save_generation_config(generation, partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def first_line(error: Exception) -> str:
    """The first line that says something, with a full stop: what a library says of a model."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return line if line.endswith(".") else line + "."
