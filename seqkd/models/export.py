"""Export of model directories that transformers and vLLM can load."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from seqkd.config.student import PruneInitConfig, StudentConfig
from seqkd.files import atomic_directory
from seqkd.models.loading import (
    end_of_sequence_ids,
    expand,
    generation_config,
    load_causal_lm,
    load_tokenizer,
    save_generation_config,
)
from seqkd.models.pruning import prune


def materialize_student(student: StudentConfig, precision: str, directory: Path) -> str:
    """Return the path of the initial student that engines and ranks load.

    It is the model itself, or ``directory`` after a pruned student was written there.
    """
    if not isinstance(student.init, PruneInitConfig):
        return expand(student.model)
    model = load_causal_lm(student.model, precision, "student.model")
    prune(model, student.init)
    export(model, None, directory, expand(student.model))
    return str(directory)


def export(
    model: nn.Module, state: dict[str, Tensor] | None, directory: Path, tokenizer_from: str
) -> None:
    """Write a directory that transformers and vLLM can load.

    It contains the weights (safetensors), the config, the tokenizer with its chat template, and the
    generation config of ``tokenizer_from`` with the token ids that end a completion in this run.
    """
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(tokenizer_from, "student.model")
    generation = generation_config(tokenizer_from) or GenerationConfig()
    stop_ids = end_of_sequence_ids(tokenizer_from, tokenizer, "student.model")
    generation.eos_token_id = list(stop_ids)
    if generation.pad_token_id is None:
        pad = tokenizer.pad_token_id
        generation.pad_token_id = stop_ids[0] if pad is None else pad
    # The generation config of the source is written last: save_pretrained rejects some of them.
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, **({"state_dict": state} if state is not None else {}))  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        save_generation_config(generation, partial)
