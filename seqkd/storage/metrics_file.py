"""metrics.jsonl of a run directory: one JSON object per optimizer step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"

Row = dict[str, Any]


def read_rows(file: Path) -> tuple[list[Row], int]:
    """Return the rows, steps ascending, and the number of damaged lines.

    A last line without a newline is still being written and is ignored. Raises OSError.
    """
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int) and step > (rows[-1]["step"] if rows else -1):
            rows.append(row)
    return rows, len(lines) - len(rows)
