"""Sources of rows: JSON, Parquet and Arrow files, and directories with the layout of the hub."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqkd.config.data import DataConfig
from seqkd.data.dataset import Reader
from seqkd.data.readers import Source
from seqkd.errors import DataError

ROWS = [{"prompt": f"p{i}", "reference": f"r{i}", "rank": i} for i in range(5)]


def arrow_file(path, table, kind=pa.ipc.new_file):
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def read(path, limit=None, **options):
    return [row for _, row in Source("data.path", str(path), **options).rows(limit)]


@pytest.fixture
def hub(tmp_path):
    """Directory in the published layout of UltraChat 200k: Parquet files, two splits, messages."""
    folder = tmp_path / "ultrachat_200k" / "data"
    folder.mkdir(parents=True)
    for split, count in (("train_sft", 6), ("test_sft", 3)):
        rows = [
            {
                "prompt": f"{split} {i}",
                "prompt_id": f"{i:064}",
                "messages": [
                    {"content": f"{split} {i}", "role": "user"},
                    {"content": f"answer {i}", "role": "assistant"},
                ],
            }
            for i in range(count)
        ]
        table = pa.Table.from_pylist(rows)
        for part, low in enumerate(range(0, count, 4)):
            name = f"{split}-{part:05}-of-{-(-count // 4):05}.parquet"
            pq.write_table(table.slice(low, 4), folder / name)
    return folder.parent


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "file", "stream"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
    table, path = pa.Table.from_pylist(ROWS), tmp_path / f"a [1].{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":  # one list, like alpaca_data.json
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        path = arrow_file(path.with_suffix(".arrow"), table, getattr(pa.ipc, f"new_{kind}"))
    assert read(path) == ROWS
    assert read(path, 2) == ROWS[:2]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_byte_order_marks_and_line_ends(tmp_path, suffix, mark):
    path = tmp_path / f"a.{suffix}"
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    for text in (json.dumps(ROWS), "\n" + json.dumps(ROWS, indent=2), lines):
        path.write_text(mark + text, encoding="utf-8", newline="")
        assert read(path) == ROWS
    for text in ('{"prompt":\n"a"}', "[1"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"is not valid JSON: .* Write one object per line"):
            read(path)
    path.write_text('{"prompt": "a"}\n["b"]\n')
    with pytest.raises(DataError, match=f"a.{suffix}:2: is not a JSON object"):
        read(path)


def test_a_glob_reads_its_files_in_order_and_reports_the_file(tmp_path):
    for number in (2, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(ROWS[number]) + "\n{\n")
    source = Source("data.path", str(tmp_path / "part-*.jsonl"))
    assert [row for _, row in source.rows(1)] == [ROWS[1]]
    with pytest.raises(DataError, match=r"part-1\.jsonl:2: is not valid JSON"):
        list(source.rows())


def test_unsupported_or_mixed_file_types_are_rejected(tmp_path):
    for name in ("a.jsonl", "b.parquet", "c.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"types: \.jsonl and \.parquet\. .* of the same type"):
        read(tmp_path / "[ab].*")
    with pytest.raises(DataError, match=r"unsupported file types: \.txt\."):
        read(tmp_path / "c.txt")


def test_splits_of_a_directory(hub):
    train = read(hub, split="train_sft")
    assert [row["prompt"] for row in train] == [f"train_sft {i}" for i in range(6)]
    assert len(read(hub, split="test_sft")) == 3
    assert len(read(hub, 2, split="train_sft")) == 2


def test_messages_of_a_parquet_data_set(hub, tokenizer):
    data = DataConfig(path=str(hub), split="train_sft", heldout_split="test_sft")
    source = Source("data.path", data.path, None, data.split)
    (first, *others) = Reader(source, data, tokenizer, 0, longest=32).read().table()
    assert first.messages == (("user", "train_sft 0"),)
    assert tokenizer.decode(first.reference_ids) == "answer 0<|end|>"
    assert len(others) == 5


def test_only_the_requested_rows_are_downloaded(hub):
    """A directory replaces the hub, from which rows are downloaded one Parquet file at a time."""
    second = hub / "data" / "train_sft-00001-of-00002.parquet"
    second.write_bytes(b"unreadable")
    rows = Source("data.path", str(hub), split="train_sft").rows(4, streaming=True)
    assert len(list(rows)) == 4
    with pytest.raises(DataError, match="cannot be read"):
        read(hub, 5, split="train_sft")


def test_a_missing_split_is_reported(hub):
    with pytest.raises(DataError, match=r"cannot be read: .*test_sft.*train_sft"):
        read(hub, split="train")


@pytest.mark.parametrize("splits", [False, True])
def test_data_sets_written_by_save_to_disk(tmp_path, splits):
    saved = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"test": saved}) if splits else saved).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="test") == ROWS


def test_a_file_has_no_splits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"data\.path: .*is a file, which has no .*split 'test'"):
        read(path, split="test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no such file"),
        ("/none/at/all", "no such file"),
        ("./none", "no such file"),
        ("none-*.json?", "no such file"),
        ("nobody/nothing", "nobody/nothing: is not a local path, and .*Check the name"),
    ],
)
def test_missing_sources_are_reported(name, message):
    with pytest.raises(DataError, match=message):
        read(name)


def test_files_with_other_content_than_their_suffix_are_reported(tmp_path):
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not UTF-8 text: .* Save it as UTF-8"):
        read(tmp_path / "a.jsonl")


def test_an_invalid_row_of_a_table_is_reported(tmp_path, tokenizer):
    table = pa.table({"prompt": ["a", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: 'prompt' is None, not text"):
        Reader(Source("data.path", path), DataConfig(path=path), tokenizer, 0).read()
