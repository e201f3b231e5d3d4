"""Any input gives a correct result or an error whose message contains the field or the file.

For more cases run ``pytest tests/unit/test_fuzz.py --hypothesis-profile=long``.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from seqkd.config.run import Config, dump, load
from seqkd.data.dataset import read_data
from seqkd.data.readers import Source
from seqkd.errors import ConfigError, DataError, StorageError, TeacherCacheError
from seqkd.storage.arrow_store import ArrowStore
from seqkd.storage.checkpoint_dir import newest, save
from seqkd.teachers.cache import identity_of, keep_teachers, open_caches
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL

TINY = ROOT / "configs" / "tiny.yaml"
DOCUMENTS = [yaml.safe_load(f.read_text()) for f in (TINY, ROOT / "configs/recipes/dolly.yaml")]
LONGEST_LINE = 1000
"""Maximum length of a message's line, which is read in a terminal."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def lines_of(error):
    """Return the lines of a message after a check that they are printable and not too long."""
    lines = str(error).split("\n")
    for line in lines:
        assert line.encode().decode().splitlines() == [line]
        assert 0 < len(line) < LONGEST_LINE, len(line)
    return lines


# --- values and damaged files

ODD = ["", " ", "\t", "\ufeff", "=", "~", "1e-3", "0x1f", "2001-01-01", "no", "<<", "*a", "&a b",
       "- a", "a: b", "'", '"', "#", "🎉", "x" * 100, "<|end|>", "{{ x }}", "../..", "*.jsonl", "[",
       "%"]  # fmt: skip
PRINTABLE = st.characters(exclude_categories=("C", "Zl", "Zp"))
TEXTS = st.text(PRINTABLE, max_size=20) | st.sampled_from(ODD)
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | TEXTS
    | st.sampled_from([10**400, -(2**63) - 1, 1e308, 5e-324, -0.0])
)  # fmt: skip
JSON_VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6
)
YAML_SCALARS = SCALARS | st.dates() | st.datetimes() | st.binary(max_size=9)
YAML_VALUES = st.recursive(
    YAML_SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS | st.integers(), v, max_size=3),
    max_leaves=6,
)

PLAUSIBLE = st.sampled_from(
    [1, 2, 4, 16, 0.1, 0.5, 1e-5, True, False, None, "student", "teacher", "dataset", "mixture",
     "float32", "bfloat16", "hf", "vllm", "top_k", "hidden", "cosine", "a/b", "~", {}, [], [1, 2]]
)  # fmt: skip


def places(node):
    """Yield all (container, key) pairs within ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def mutated(draw, documents, values):
    """Draw a document with values replaced, removed, added, nested or moved."""
    document = copy.deepcopy(draw(documents))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        items = list(places(document))
        if not items:
            break
        node, key = draw(st.sampled_from(items))
        what = draw(st.sampled_from(["replace", "remove", "add", "nest", "copy", "rename"]))
        if what == "replace":
            node[key] = draw(values)
        elif what == "remove":
            del node[key]
        elif what == "nest":
            node[key] = draw(st.sampled_from([[node[key]], {"kind": node[key]}, {key: node[key]}]))
        elif what == "copy":
            other, its_key = draw(st.sampled_from(items))
            node[key] = copy.deepcopy(other.get(its_key) if isinstance(other, dict) else other)
        elif isinstance(node, dict):
            value = node.pop(key) if what == "rename" else draw(values)
            node[draw(TEXTS | st.sampled_from([str(k) for _, k in items]))] = value
    return document


@st.composite
def damaged(draw, content):
    """Draw a damaged copy of ``content``: bytes flipped, cut, appended, inserted, zeroed or
    replaced, once or twice."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(1, 64)))
        what = draw(st.sampled_from(["flip", "cut", "append", "insert", "zero", "replace", "drop"]))
        some = draw(st.binary(min_size=1, max_size=64))
        content = {
            "flip": content[:at] + bytes(b ^ (1 << len(some) % 8) for b in content[at : at + 1])
            + content[at + 1 :],
            "cut": content[:at],
            "append": content + some,
            "insert": content[:at] + some + content[at:],
            "zero": content[:at] + bytes(end - at) + content[end:],
            "replace": content[:at] + some + content[at + len(some) :],
            "drop": content[:at] + content[end:],
        }[what]  # fmt: skip
    return content


# --- configuration files and overrides

SNIPPETS = [
    *ODD, "\n", ": ", "- ", "? ", "---\n", "&a ", "*a", "<<: *a\n", "!!python/object:os.system ",
    "2001-99-99", "!!int x", "!!float x", ".nan", ".inf", "1" * 30, "[" * 1500, "{a: ",
    "name: tiny\n", "steps: 3\n", "|\n", ">\n",
]  # fmt: skip
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)

VALUE = re.compile(r"(?<=: )[^\n,}]+")


@st.composite
def config_texts(draw):
    """Draw the bytes of a possibly invalid configuration."""
    if draw(st.booleans()):
        text = yaml.safe_dump(draw(mutated(st.sampled_from(DOCUMENTS), YAML_VALUES | PLAUSIBLE)))
    else:
        text = draw(st.sampled_from([TINY.read_text(), yaml.safe_dump(DOCUMENTS[1])]))
        for _ in range(draw(st.integers(1, 3))):
            snippet = draw(st.sampled_from(SNIPPETS) | TEXTS)
            if draw(st.booleans()):
                at, end = draw(
                    st.sampled_from([m.span() for m in VALUE.finditer(text)] or [(0, 0)])
                )
            else:
                at = draw(st.integers(0, len(text)))
                end = at + draw(st.integers(0, 9))
            text = text[:at] + snippet + text[end:]
    return text.encode()


def check_config(path, overrides=()):
    try:
        config = load(path, overrides)
    except ConfigError as error:
        for line in lines_of(error):
            assert line.startswith((f"{path}: ", "override "))
        event("not YAML" if "is not valid YAML" in str(error) else "rejected")
        return
    event("loads")
    again = path.parent / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load(again) == config


@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(str.encode)
    | YAML_VALUES.map(lambda v: yaml.safe_dump(v).encode())
)
def test_arbitrary_bytes_as_a_configuration(folder, content):
    path = folder / "c.yaml"
    path.write_bytes(content)
    check_config(path)


def tiny_with(line):
    return (TINY.read_text() + line + "\n").encode()


@given(config_texts())
@example(content=tiny_with("cluster: 2001-99-99"))
@example(content=tiny_with("cluster: !!int x"))
@example(content=tiny_with("cluster: " + "[" * 1500))
@example(content=tiny_with("seed: " + "x" * 5000))
@example(content=tiny_with(BOMB + "cluster: *a8"))
@example(content=tiny_with("extra_terms: &a [*a]"))
@example(content=tiny_with("1: 2"))
@example(content=tiny_with("? [1]\n: 2"))
def test_a_mutated_configuration(folder, content):
    path = folder / "c.yaml"
    path.write_bytes(content)
    check_config(path)


def some(**fields):
    """Strategy for mappings with some of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


SHARE, POSITIVE, COUNT = st.floats(0, 1), st.floats(0, 1e9), st.sampled_from([1, 2, 4, 10**12])
UNITS = st.sampled_from(["token", "sequence", "nat"])
SAMPLERS = st.sampled_from(["student", "teacher", "mixture", "dataset", "corpus", "teacher_cache"])
KINDS = ["sequence_reverse_kl", "sequence_forward_kl", "sampled_token", "sft", "token_forward_kl",
         "token_reverse_kl", "gjsd", "skew_kl", "skew_reverse_kl", "total_variation"]  # fmt: skip
OBJECTIVES = st.sampled_from(KINDS).map(lambda kind: {"kind": kind}) | some(
    estimator=st.sampled_from(["reinforce", "reward_to_go", "single_step", "rao_blackwell"]),
    baseline=st.sampled_from(["none", "leave_one_out", "position_mean"]),
    normalization=st.sampled_from(["rate", "total", "minillm", "neutral"]), discount=SHARE,
    stop=st.sampled_from(["future", "graded"]),
    clip_ratio=SHARE, importance_ratio_cap=POSITIVE,
)  # fmt: skip
LOCAL = st.builds(
    lambda kind, rest: {"kind": kind, "model": "b", **rest},
    st.sampled_from(["vllm", "hf"]),
    some(scores=st.sampled_from(["hidden", "logprobs", "top_k"]), top_k=COUNT),
)
TEACHERS = LOCAL | st.dictionaries(TEXTS, st.builds(dict, teacher=LOCAL, weight=POSITIVE)).map(
    lambda members: {"kind": "multi", "teachers": members}
)
CHOICES = some(
    name=TEXTS, runs_dir=TEXTS, cluster=TEXTS, seed=st.integers(0), steps=COUNT, weight=POSITIVE,
    sampler=SAMPLERS, objective=OBJECTIVES, updates_per_rollout=COUNT, teacher=TEACHERS,
    prompts_per_step=st.sampled_from([4, 8, 12]), placement=st.sampled_from(["colocated", "split"]),
    extra_terms=st.lists(
        some(sampler=SAMPLERS, objective=OBJECTIVES, weight=POSITIVE, unit=UNITS), max_size=2
    ),
    unit=UNITS,
    warmup=some(sampler=SAMPLERS, lr=POSITIVE).map(lambda w: {"steps": 2, **w}),
    teacher_cache=some(records=st.sampled_from(["teacher", "dataset"])).map(
        lambda cache: {"path": "j", **cache}
    ),
    rollout=some(samples_per_prompt=COUNT, temperature=POSITIVE, top_p=SHARE, max_tokens=COUNT),
    learner=some(lr=POSITIVE, betas=st.tuples(SHARE, SHARE).map(list), ranks=COUNT, gpus=SHARE,
                 zero_stage=st.integers(0, 3), micro_batch_tokens=COUNT, min_lr_ratio=SHARE),
    data=st.builds(
        lambda path, rest: {"path": path, "corpus_path": path, **rest}, TEXTS,
        some(heldout_path=TEXTS, heldout_fraction=SHARE, system=TEXTS, rows=COUNT, tag_key=TEXTS),
    ),
)  # fmt: skip


@given(CHOICES)
@example(choices={"runs_dir": "=", "cluster": "1e-3"})
@example(choices={"runs_dir": "\x85"})
@example(choices={"runs_dir": "a\u2028\ufeffä"})
def test_valid_configurations_survive_a_round_trip(folder, choices):
    path = folder / "c.yaml"
    document = {**MINIMAL, "evaluation": {"prompts": 0}, **choices}
    path.write_text(yaml.safe_dump(document, allow_unicode=False), encoding="utf-8")
    check_config(path)


KEYS = sorted({".".join(path) for path in [("name",), ("data", "path"), ("teacher", "kind"),
               ("teacher", "teachers", "a", "teacher"), ("objective", "kind"), ("extra_terms",),
               ("steps",), ("learner", "lr"), ("learner", "betas"), ("warmup", "steps"),
               ("sampler",),
               ("data", "heldout_fraction"), ("student", "init"), ("teacher_cache", "path"),
               ("seed",), ("steps", "steps"), ("", ""), ("extra_terms", "0", "weight"),
               ("cluster",)]})  # fmt: skip
VALUES = (
    YAML_VALUES.map(lambda v: yaml.safe_dump(v, default_flow_style=True))
    | st.sampled_from(SNIPPETS)
    | TEXTS
    | PLAUSIBLE.map(str)
)


FITTING = st.sampled_from(
    ["steps=3", "learner.lr=1e-4", "sampler=teacher", "evaluation.prompts=0", "cluster=a: b",
     "data.heldout_path=null", "warmup={steps: 1, sampler: dataset}", "cluster= '='"]
)  # fmt: skip


@given(
    st.lists(
        FITTING | TEXTS | st.builds("{}={}".format, st.sampled_from(KEYS) | TEXTS, VALUES),
        min_size=1,
        max_size=3,
    )
)
@example(overrides=["x" * 5000])
@example(overrides=["seed=0000-00-00"])
@example(overrides=["cluster=" + "[" * 1500])
@example(overrides=["extra_terms=[1, 2]", "extra_terms.0=3"])
def test_arbitrary_overrides(folder, overrides):
    path = folder / "tiny.yaml"
    shutil.copy(TINY, path)
    check_config(path, overrides)


def test_a_repeated_key_is_rejected(folder):
    path = folder / "twice.yaml"
    path.write_bytes(tiny_with("steps: 7"))
    with pytest.raises(
        ConfigError,
        match=r"twice\.yaml: is not valid YAML: line 12, .*: key 'steps' is repeated",
    ):
        load(path)
    path.write_bytes(tiny_with("warmup: {<<: {steps: 3, sampler: teacher}, steps: 4}"))
    assert load(path).warmup.steps == 4, "a key that overrides a merged key is not repeated"


def test_an_override_changes_only_one_of_the_places_that_share_an_alias(folder):
    path = folder / "alias.yaml"
    path.write_bytes(tiny_with("").replace(b"kv_cache_gib: 0.1}", b"generation: &e {cpus: 2}}", 1))
    path.write_text(re.sub("rollout: .*", "rollout: *e", path.read_text()))
    config = load(path, ["rollout.cpus=5"])
    assert (config.rollout.cpus, config.teacher.generation.cpus) == (5, 2)


# --- rows

WORDS = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["hi", "what?", "<|end|>", "é\u2028x", "\x1c.", "long " * 20]
)
ANSWERS = st.none() | st.just(" ") | WORDS


@st.composite
def rows_with_prompts(draw):
    """Draw a row of a supported format and its number of prompts."""
    form = draw(st.sampled_from(["prompt", "instruction", "messages", "lists"]))
    if form == "prompt":
        return {"prompt": draw(WORDS), "reference": draw(ANSWERS)}, 1
    if form == "instruction":
        return {"instruction": draw(WORDS), "input": draw(ANSWERS), "output": draw(ANSWERS)}, 1
    system = draw(st.sampled_from([[], [{"role": "system", "content": "s"}]]))
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": draw(WORDS)}
        for i in range(draw(st.integers(1, 6)))
    ]
    if form == "messages":
        return {"messages": system + turns}, (len(turns) + 1) // 2
    last = [{"role": "assistant", "content": draw(WORDS)}]
    return {"prompt": system + turns[: len(turns) // 2 * 2 + 1], "completion": last}, 1


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "chat": st.just(False),
        "system": st.just("be brief"),
        "too_long": st.just("truncate"),
        "max_prompt_tokens": st.integers(1, 40),
        "turns": st.sampled_from(["first", "last"]),
        "heldout_fraction": st.just(0.5),
        "tag_key": st.just("tag"),
    },
)


def read(path, tokenizer, options, sampler, max_tokens=16):
    data = {"path": str(path), **options}
    config = Config.model_validate({
        **MINIMAL, "data": data, "sampler": sampler, "rollout": {"max_tokens": max_tokens},
        "evaluation": {"prompts": 9999 if "heldout_fraction" in options else 0},
    })  # fmt: skip
    return read_data(config, tokenizer, (0,))


def field_line(error):
    (line,) = lines_of(error)
    assert line.startswith("data.")
    return line


@given(
    st.lists(rows_with_prompts(), min_size=1, max_size=8),
    OPTIONS,
    st.sampled_from(["student", "dataset"]),
    st.integers(1, 24),
)
@example(
    rows=[({"instruction": "a", "input": " ", "output": "b"}, 1)],
    options={},
    sampler="dataset",
    max_tokens=9,
)
def test_dropped_prompts_of_valid_rows_are_counted(
    folder, tokenizer, rows, options, sampler, max_tokens
):
    form = next(k for k in ("messages", "instruction", "prompt") if k in rows[0][0])
    rows = [({**row, "tag": "t"}, n) for row, n in rows if form in row]
    path = folder / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    answers = {k for k in ("reference", "completion", "output") if k in rows[0][0]}
    assume(all(answers <= row.keys() for row, _ in rows))
    try:
        data = read(path, tokenizer, options, sampler, max_tokens)
    except DataError as error:
        line = field_line(error)
        assert "longer than" in line or "has an answer" in line or "no conversations" in line
        event("no prompts")
        return
    event("read")
    counts = Counter()
    for summary in data.summaries:
        for name in ("prompts", "long_prompts", "long_answers", "unanswered", "duplicates"):
            counts[name] += getattr(summary, name)
    assert len(data.train) + len(data.heldout) == counts["prompts"]
    assert counts.total() == sum(1 if "turns" in options else n for _, n in rows)
    dropped = [int(line.split()[1]) for line in data.warnings if "dropped" in line]
    assert sum(dropped) == counts.total() - counts["prompts"]


@st.composite
def row_bytes(draw):
    """Draw the bytes of a possibly invalid file of rows."""
    rows = [row for row, _ in draw(st.lists(rows_with_prompts(), min_size=1, max_size=4))]
    if draw(st.booleans()):
        rows = draw(mutated(st.just(rows), JSON_VALUES))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return draw(damaged(content)) if draw(st.booleans()) else content


def row(content, **arguments):
    return example(**{"content": content, "options": {}, "sampler": "student", "suffix": "jsonl",
                      **arguments})  # fmt: skip


@given(
    row_bytes() | st.binary(max_size=100),
    OPTIONS,
    st.sampled_from(["student", "dataset", "corpus"]),
    st.sampled_from(["jsonl", "json"]),
)
@row(rb'{"prompt": "a\ud800"}')
@row(rb'{"prompt": "a\ud800"}', sampler="corpus")
@row(rb'{"messages": [{"role": "user", "content": "a"}, {"role": "\udfff", "content": "b"}]}')
@row(rb'{"prompt": "a", "tag": "\ud800"}', options={"tag_key": "tag"})
@row(b'{"prompt": %s}' % (b"1" * 5000))
@row(b'{"prompt": %s}' % (b"[" * 5000))
@row(b'{"prompt": %s%s}' % (b"[" * 900, b"]" * 900))
@row(b'{"%s": 1}' % (b"k" * 5000))
def test_arbitrary_rows(folder, tokenizer, content, options, sampler, suffix):
    path = folder / f"rows.{suffix}"
    path.write_bytes(content)
    if sampler == "corpus":
        options = {**options, "corpus_path": str(path), "text_key": "prompt"}
    try:
        data = read(path, tokenizer, options, sampler)
    except DataError as error:
        field_line(error)
        event("rejected")
        return
    event("read")
    for line in data.warnings:
        lines_of(line)
    for prompt in [*data.train, *data.heldout, *data.corpus]:
        assert prompt.token_ids
    for prompt in data.train if sampler == "dataset" else data.corpus:
        assert prompt.reference_ids


@pytest.fixture(scope="module")
def tables(folder):
    """Contents of files that `datasets` reads, by suffix."""
    table = pa.table({"prompt": [f"question {i}" for i in range(20)], "reference": ["a"] * 20})
    with pa.ipc.new_file(folder / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, folder / "t.parquet")
    return {suffix: (folder / f"t.{suffix}").read_bytes() for suffix in ("arrow", "parquet")}


@given(st.data())
def test_a_damaged_table(folder, tables, data):
    suffix = data.draw(st.sampled_from(sorted(tables)))
    path = folder / f"damaged.{suffix}"
    path.write_bytes(data.draw(damaged(tables[suffix])))
    try:
        rows = list(Source("data.path", str(path)).rows())
    except DataError as error:
        field_line(error)
        event("rejected")
        return
    event("read")
    assert all(isinstance(row, dict) for _, row in rows)


# --- the teacher cache

SCHEMA = pa.schema([("address", pa.string()), ("value", pa.large_binary())])
ROWS = [{"address": f"a{i % 3}", "value": bytes([i]) * 50} for i in range(5)]


@pytest.fixture(scope="module")
def shard(folder):
    ArrowStore(folder / "whole", SCHEMA).append(ROWS)
    (file,) = (folder / "whole").iterdir()
    return file


def rows_of(shards):
    return [
        {name: row[name].as_py() for name in row}
        for address in shards.places
        for row in shards.rows(address, 0, shards.count(address))
    ]


@given(st.data())
def test_a_damaged_file_of_the_cache(folder, shard, data):
    directory = folder / "damaged"
    directory.mkdir(exist_ok=True)
    whole = shard.read_bytes()
    content = data.draw(damaged(whole))
    file = directory / shard.name
    file.write_bytes(content)
    if content == whole:
        assert len(rows_of(ArrowStore(directory, SCHEMA))) == len(ROWS)
        return
    with pytest.raises(TeacherCacheError) as caught:
        ArrowStore(directory, SCHEMA)
    (line,) = lines_of(caught.value)
    assert f"{file} is damaged" in line
    shards = ArrowStore(directory, SCHEMA, damaged="drop")
    assert (shards.dropped, shards.places) == ([file.name], {})


ENDPOINT = {"kind": "openai", "model": "m", "base_url": "http://x/v1"}


@given(
    st.binary(max_size=50)
    | JSON_VALUES.map(lambda v: json.dumps(v).encode())
    | damaged(json.dumps({"model": "m", "base_url": "http://x/v1", "api": "chat"}).encode())
)
@example(content=b"")
@example(content=b"\x80")
@example(content=b"[" * 5000)
@example(content=b'{"%s": 1}' % (b"x" * 5000))
def test_a_damaged_description_of_a_teacher(folder, content):
    config = Config.model_validate({
        **MINIMAL, "teacher": ENDPOINT, "sampler": "teacher",
        "teacher_cache": {"path": str(folder / "j")},
    })  # fmt: skip
    directory = folder / "j" / "another"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "teacher.json").write_bytes(content)
    mine = folder / "j" / identity_of(config.teacher, {})
    assert open_caches(config, True)[1][""].directory == mine, (
        "damage of another cache has no effect"
    )
    try:
        _, caches = open_caches(config, False)
    except TeacherCacheError as error:
        (line,) = lines_of(error)
        assert line.startswith(f"teacher_cache.path: {folder / 'j'}")
    else:
        assert json.loads(content) == config.teacher.describe()
        assert caches[""].directory == directory


def test_a_cache_that_cannot_be_written_is_reported(folder):
    (folder / "file").touch()
    config = Config.model_validate({
        **MINIMAL, "teacher": ENDPOINT, "sampler": "teacher",
        "teacher_cache": {"path": str(folder / "file" / "j")},
    })  # fmt: skip
    _, caches = open_caches(config, True)
    with pytest.raises(StorageError, match=r"teacher\.json: cannot be written: Not a directory\."):
        keep_teachers(config, caches)


# --- checkpoints

FILES = {"weights.bin": bytes(range(200)), "rank/0.bin": b"state"}


def put(root, step):
    def write(directory):
        (directory / "rank").mkdir()
        for name, content in FILES.items():
            (directory / name).write_bytes(content)

    return save(root, step, write, {"step": step, "loss": 0.5}, 9)


@pytest.fixture(scope="module")
def checkpoints(folder):
    put(folder / "checkpoints", 5)
    return put(folder / "checkpoints", 10)


@given(st.data())
def test_a_damaged_checkpoint(checkpoints, data):
    root = checkpoints.parent
    names = [*FILES, "state.json", "manifest.json"]
    file = checkpoints / data.draw(st.sampled_from(names))
    whole = file.read_bytes()
    content = data.draw(
        damaged(whole) | st.binary(max_size=50) | JSON_VALUES.map(lambda v: json.dumps(v).encode())
    )
    file.write_bytes(content)
    try:
        path, state, skipped = newest(root)
    finally:
        file.write_bytes(whole)
    event("skipped" if skipped else "whole")
    if path == checkpoints:
        assert (state, skipped) == ({"step": 10, "loss": 0.5}, [])
        assert content == whole or file.name == "manifest.json"
    else:
        assert (path, state) == (root / "step-00000005", {"step": 5, "loss": 0.5})
        (line,) = lines_of("\n".join(skipped))
        assert line.startswith(f"{checkpoints}: ")
