"""Safetensors files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from seqkd.errors import ModelError
from seqkd.models.loading import expand, load_config


def checkpoint_digest(model: str, download: bool) -> str | None:
    """Return a digest of a checkpoint's config and weight files. If the checkpoint is not on this
    machine, download it if ``download`` is True, otherwise return None."""
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
    """Return the file of every parameter, for a checkpoint of one or several files."""
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
        raise ModelError(
            f"teacher.model: {model!r} has no safetensors weights. Convert it to safetensors."
        )
    with safe_open(single, framework="pt") as reader:
        return dict.fromkeys(reader.keys(), single)
