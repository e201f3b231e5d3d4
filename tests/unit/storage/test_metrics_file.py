"""Reading metrics.jsonl: valid rows in order, and the number of damaged lines."""

from __future__ import annotations

import pytest

from seqkd.storage.metrics_file import read_rows


@pytest.mark.parametrize(
    ("text", "steps", "damaged"),
    [
        ("", [], 0),
        ('{"step": 0}\n{"step": 2}\n', [0, 2], 0),
        ('{"step": 0}\n{"step": 1}', [0], 0),  # the last line is still being written
        ('{"step": 0}\n{"step": 0}\n{"step": 1}\n', [0, 1], 1),
        ('{"step": 1}\n{"step": 0}\nnoise\n[1]\n{"step": "x"}\n{}\n{"step": 2}\n', [1, 2], 5),
    ],
)
def test_rows_in_the_order_of_their_steps(tmp_path, text, steps, damaged):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    rows, lost = read_rows(file)
    assert [row["step"] for row in rows] == steps and lost == damaged


def test_invalid_bytes_damage_only_their_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n\xff\xfe\n{"step": 1, "loss": null}\n')
    assert read_rows(file) == ([{"step": 0}, {"step": 1, "loss": None}], 1)
