"""Checkpoints on disk: directories ``step-00000010`` that are complete or absent.

A manifest stores the size and the digest of every file. It distinguishes a complete checkpoint from
one that a killed process did not finish or a damaged disk has corrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from seqkd.errors import CheckpointError
from seqkd.files import atomic_directory, file_digest

STATE, MANIFEST = "state.json", "manifest.json"
UNFINISHED = "is incomplete."
NAME = re.compile(r"step-([0-9]{8,})(|\.old|\.partial)")
"""Name of a checkpoint, of a checkpoint that is being replaced, or of an incomplete one."""


def save(
    root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep_last: int
) -> Path:
    """Save a checkpoint at ``root/step-XXXXXXXX``. ``write`` writes the files into the directory
    that it receives. An existing checkpoint of this step is replaced. Of this and the earlier
    checkpoints, the last ``keep_last`` are kept. Only one process at a time may save below
    ``root``.

    Raises StorageError; earlier checkpoints are kept in that case.
    """
    final = root / f"step-{step:08d}"
    with atomic_directory(final) as partial:
        write(partial)
        (partial / STATE).write_text(json.dumps(state, allow_nan=True), encoding="utf-8")
        manifest = json.dumps(_manifest(partial), indent=1)
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    _remove_older(root, step, keep_last)
    return final


def newest(
    root: Path, check: Callable[[Path, dict[str, Any]], None] = lambda path, state: None
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the newest complete checkpoint. Returns its path, its state, and one line for each later
    checkpoint that is incomplete, damaged, or for which ``check`` raises CheckpointError. The path
    is None and the state is empty if there is no other checkpoint.
    """
    skipped: list[str] = []
    for path in _checkpoints(root):
        try:
            _verify(path)
            state = load_state(path)
            check(path, state)
            return path, state, skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, {}, skipped


def oldest_state(root: Path) -> dict[str, Any]:
    """Read the state of the earliest checkpoint that :func:`newest` may return; empty if none."""
    for path in reversed(_checkpoints(root)):
        if not path.suffix:
            with suppress(CheckpointError):
                return load_state(path)
    return {}


def load_state(path: Path) -> dict[str, Any]:
    """Read the state that was passed to :func:`save`. Raises CheckpointError."""
    state = _read_json(path, STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {STATE} is damaged: it is not a JSON object.")
    return state


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": file.stat().st_size, "xxh3": file_digest(file)}
        for name, file in _files(directory).items()
    }


def _files(directory: Path) -> dict[str, Path]:
    """Return all files except the manifest, by their paths below ``directory``. Raises OSError."""
    files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    return {name: files[name] for name in sorted(files) if name != MANIFEST}


def _verify(path: Path) -> None:
    """Raise CheckpointError unless ``path`` is a complete checkpoint."""
    if path.suffix == ".partial":
        raise CheckpointError(f"{path}: {UNFINISHED}")
    manifest = _read_json(path, MANIFEST)
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: it does not list {STATE}.")
    try:
        files = _files(path)
        for name, expected in manifest.items():
            if name not in files:
                raise CheckpointError(f"{path}: {name!r:.80} is missing.")
            file = files[name]
            if expected != {"bytes": file.stat().st_size, "xxh3": file_digest(file)}:
                raise CheckpointError(
                    f"{path}: {name!r:.80} is damaged: its size or digest differs from the "
                    "manifest."
                )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {name} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error!s:.200}.") from None


def _checkpoints(root: Path) -> list[Path]:
    """Return all paths with the name of a checkpoint: latest step first, complete before
    incomplete."""
    try:
        names = [match for name in os.listdir(root) if (match := NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}.") from None
    order = ("", ".old", ".partial")
    names.sort(key=lambda match: (-int(match[1]), order.index(match[2])))
    return [root / match[0] for match in names]


def _remove_older(root: Path, step: int, keep_last: int) -> None:
    """Remove checkpoints that are no longer needed once ``step`` is saved. Later steps are kept:
    they are damaged, so the run returned to an earlier step and will replace them."""
    earlier = [path for path in _checkpoints(root) if _step(path) <= step]
    whole: dict[int, Path] = {}
    for path in earlier:
        if path.suffix != ".partial":
            whole.setdefault(_step(path), path)
    kept = list(whole.values())[: max(keep_last, 1)]
    for path in earlier:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
