"""Files of a model directory: location, completeness and digests of their content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqkd.errors import ModelError
from seqkd.files import file_digest
from seqkd.models.loading import first_line, load_config

SETTINGS = (
    "*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "model.safetensors.index.json",
)  # fmt: skip
"""Patterns of the names of all files that a run reads, except the weights."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGESTS_AT_ONCE = 8
"""Maximum number of files that are read at the same time."""


def load_complete(model: str, field: str) -> Any:
    """Return the transformers config of a causal language model whose files are complete. Raises
    ModelError with ``field``."""
    config = load_config(model, field)
    model_files(model, field)
    return config


def model_files(model: str, field: str, download: bool = False) -> list[Path] | None:
    """Return the files that a run reads of a model: config, tokenizer, chat template, weights.

    Check that every file is complete. JSON files are read. Of the weights, only the header is read,
    which determines the size of the file.

    Files of a hub model are downloaded if ``download`` is True. Otherwise only files on this
    machine are checked, and None is returned if some of the model's files are not on it.

    Raises ModelError with ``field`` and the file.
    """
    try:
        folder = _folder(model, SETTINGS, download)
        settings = sorted({file for pattern in SETTINGS for file in folder.glob(pattern)})
        for file in settings:
            if file.suffix == ".json":
                _check_json(file, field)
        names = _weight_names(folder, field)
        if download:
            folder = _folder(model, names, download)
    except (OSError, ValueError) as error:
        if not download:
            return None
        raise ModelError(
            f"{field}: {model!r} cannot be loaded: {first_line(error)} Set it to a directory "
            "written by save_pretrained, or to a hub name that this machine can access."
        ) from None
    weights = [folder / name for name in names]
    missing = [file for file in weights if not file.exists()]
    for file in weights:
        if file not in missing:
            _check_safetensors(file, field)
    if missing and not download and not _is_local(model):
        return None
    if missing and (folder / INDEX).exists():
        raise ModelError(
            f"{field}: {missing[0]} does not exist, although {INDEX} lists it. Copy or download "
            "the model again."
        )
    if missing:
        raise ModelError(
            f"{field}: {model!r} has no safetensors weights. Set it to a model with "
            "safetensors weights, or convert it."
        )
    return [*settings, *weights]


def parameter_files(model: str, field: str) -> dict[str, Path]:
    """Return the file of every parameter of a model, which is downloaded if necessary. Raises
    ModelError with ``field``."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in model_files(model, field, download=True) or ():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as reader:
                files |= dict.fromkeys(reader.keys(), file)
    return files


def identify(models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Compute the digests of all files of the models, which are downloaded if necessary.

    ``models`` contains directories or hub names by configuration key. The result contains, by the
    same key, ``model`` and ``files``, the digests by file name. Raises ModelError.
    """
    files = {
        field: model_files(model, field, download=True) or [] for field, model in models.items()
    }
    digests = digests_of({file for below in files.values() for file in below}, ", ".join(models))
    return {
        field: {"model": models[field], "files": {file.name: digests[file] for file in below}}
        for field, below in files.items()
    }


def checkpoint_digests(model: str, field: str, download: bool) -> dict[str, str] | None:
    """Return the digests of a checkpoint's config and weights, by file name. If the checkpoint is
    not on this machine, download it if ``download`` is True, otherwise return None. Raises
    ModelError with ``field``."""
    if download:
        load_config(model, field)
    files = model_files(model, field, download)
    if files is None:
        return None
    kept = [f for f in files if f.name == "config.json" or f.suffix == ".safetensors"]
    digests = digests_of(kept, field)
    return {file.name: digests[file] for file in kept}


def digests_of(files: Iterable[Path], field: str) -> dict[Path, str]:
    """Compute the digests of several files in parallel. Raises ModelError with ``field``."""

    def digest(file: Path) -> str:
        with _readable(field, file):
            return file_digest(file)

    ordered = sorted(files)
    with ThreadPoolExecutor(min(DIGESTS_AT_ONCE, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(digest, ordered), strict=True))


def _is_local(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _folder(model: str, patterns: Iterable[str], download: bool) -> Path:
    """Return the model's directory, which for a hub model is a snapshot. Raises OSError or
    ValueError if a hub model has no snapshot."""
    if _is_local(model):
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(
        model, allow_patterns=[*patterns], ignore_patterns="*/*", local_files_only=not download
    )
    return Path(snapshot)


def _weight_names(folder: Path, field: str) -> list[str]:
    """Return the names of the files with the weights. If there is an index, transformers may still
    prefer a single file."""
    index = folder / INDEX
    if not index.exists():
        return [SINGLE]
    content = _check_json(index, field)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{field}: {index} has no weight_map. Copy or download it again.")
    names = {str(name) for name in weight_map.values()}
    return sorted(names | ({SINGLE} if (folder / SINGLE).exists() else set()))


def _check_json(file: Path, field: str) -> Any:
    with _readable(field, file):
        content = file.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{field}: {file} is not valid JSON: {first_line(error)} Copy or download it again."
        ) from None


def _check_safetensors(file: Path, field: str) -> None:
    """Raise ModelError unless the header is valid and the file has the size that it determines."""
    from safetensors import SafetensorError, safe_open

    with _readable(field, file):
        size = file.stat().st_size
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            reason = first_line(error).removeprefix("Error while deserializing header: ")
            raise ModelError(
                f"{field}: {file} is not a complete safetensors file: {reason} It has {size:,} "
                "bytes. Copy or download it again."
            ) from None


@contextmanager
def _readable(field: str, file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{field}: {file} cannot be read: {error.strerror or error}. Copy or "
            "download it again, or correct the permissions."
        ) from None
