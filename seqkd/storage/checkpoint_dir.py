"""Checkpoints on disk: directories ``step-00000010`` that are there whole or not at all.

A manifest holds the size and the digest of every file, so that of several checkpoints the newest
that is whole can be told from what a killed process or a damaged disk left behind.
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
UNFINISHED = "was not finished."
NAME = re.compile(r"step-([0-9]{8,})(|\.old|\.partial)")
"""Of a checkpoint; of one that another is about to replace; of one that is not finished."""


def save(
    root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep_last: int
) -> Path:
    """A new checkpoint at ``root/step-XXXXXXXX``, whose files ``write`` puts into the directory
    that it is given; one of that step which is there already is replaced. Of this and the earlier
    ones the last ``keep_last`` are kept. One process at a time may save below ``root``.

    StorageError where the disk refuses: what was saved before is kept.
    """
    final = root / f"step-{step:08d}"
    with atomic_directory(final) as partial:
        write(partial)
        (partial / STATE).write_text(json.dumps(state, allow_nan=True), encoding="utf-8")
        manifest = json.dumps(_manifest(partial), indent=1)
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    _remove_older(root, step, keep_last)
    return final


def newest(root: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and a line for each later one that is not.

    None and an empty state where there is none.
    """
    skipped: list[str] = []
    for path in _found(root):
        try:
            _verify(path)
            return path, load_state(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, {}, skipped


def oldest_state(root: Path) -> dict[str, Any]:
    """The state of the earliest checkpoint that :func:`newest` may go back to; empty without."""
    for path in reversed(_found(root)):
        if not path.suffix:
            with suppress(CheckpointError):
                return load_state(path)
    return {}


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save` was given as the state. Raises CheckpointError."""
    state = _read_json(path, STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {STATE} is damaged: it holds no keys.")
    return state


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": file.stat().st_size, "xxh3": file_digest(file)}
        for name, file in _files(directory).items()
    }


def _files(directory: Path) -> dict[str, Path]:
    """Every file by its path below ``directory``, but for the manifest. Raises OSError."""
    files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    return {name: files[name] for name in sorted(files) if name != MANIFEST}


def _verify(path: Path) -> None:
    """CheckpointError where ``path`` is not a whole checkpoint."""
    if path.suffix == ".partial":
        raise CheckpointError(f"{path}: {UNFINISHED}")
    manifest = _read_json(path, MANIFEST)
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: it does not name {STATE}.")
    try:
        files = _files(path)
        for name, known in manifest.items():
            if name not in files:
                raise CheckpointError(f"{path}: {name!r:.80} is missing.")
            file = files[name]
            if known != {"bytes": file.stat().st_size, "xxh3": file_digest(file)}:
                raise CheckpointError(f"{path}: {name!r:.80} is damaged: its digest is another.")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {name} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error!s:.200}.") from None


def _found(root: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, the latest step first, whole ones before others."""
    try:
        names = [found for name in os.listdir(root) if (found := NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}.") from None
    order = ("", ".old", ".partial")
    names.sort(key=lambda found: (-int(found[1]), order.index(found[2])))
    return [root / found[0] for found in names]


def _remove_older(root: Path, step: int, keep_last: int) -> None:
    """What is no longer needed once ``step`` is saved. A later step stays: this run went back to
    before it because it is damaged, and will replace it."""
    earlier = [path for path in _found(root) if _step(path) <= step]
    whole: dict[int, Path] = {}
    for path in earlier:
        if path.suffix != ".partial":
            whole.setdefault(_step(path), path)
    kept = list(whole.values())[: max(keep_last, 1)]
    for path in earlier:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
