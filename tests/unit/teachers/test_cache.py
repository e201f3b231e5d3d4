"""The teacher cache: every request is made once, and stored results are restored exactly."""

from __future__ import annotations

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seqkd.config.run import Config
from seqkd.errors import StorageError, TeacherCacheError
from seqkd.models.output_head import load_head
from seqkd.teachers.cache import (
    CachedSampler,
    CachedTeacher,
    TeacherCache,
    bytes_per_token,
    keep_teachers,
    open_caches,
    score_form,
)
from seqkd.training.precompute import check_recorded
from seqkd.types import Prompt, Rollout, TeacherScore
from tests.unit.config.test_config import MINIMAL

PROMPTS = [Prompt(f"p{i}", (i, 9), f"prompt {i}") for i in range(4)]


class Sampler:
    """Sampler whose completions contain their number."""

    def __init__(self):
        self.calls, self.number = [], 0

    def sample(self, prompts, samples, seed, temperature=1.0, top_p=1.0, finished=None):
        self.calls.append({p.prompt_id: n for p, n in zip(prompts, samples, strict=True)})
        return [self.rollout(p) for p, n in zip(prompts, samples, strict=True) for _ in range(n)]

    def rollout(self, prompt):
        self.number += 1
        return Rollout(prompt.prompt_id, f"{prompt.prompt_id}/{self.number}", prompt.token_ids,
                       (self.number, 7), (-0.1, -1 / 3), "teacher", 0, "length")  # fmt: skip

    def usage(self):
        return {"requests": len(self.calls)}


class Teacher:
    """Teacher with scores in one of the three forms."""

    def __init__(self, form="logprobs"):
        self.form, self.scored = form, []

    def score(self, rollouts):
        self.scored += [r.sample_id for r in rollouts]
        return {r.sample_id: self.one(r) for r in rollouts}

    def one(self, rollout):
        generator = torch.Generator().manual_seed(sum(rollout.completion_ids))
        tokens = len(rollout.completion_ids)
        logprobs = -torch.rand(tokens, generator=generator)
        if self.form == "hidden":
            return TeacherScore(rollout.sample_id, hidden=torch.randn(tokens, 8))
        if self.form == "logprobs":
            return TeacherScore(rollout.sample_id, logprobs=logprobs)
        top = torch.arange(tokens * 3, dtype=torch.int32).view(tokens, 3)
        return TeacherScore(rollout.sample_id, None, logprobs, top, -torch.rand(tokens, 4))


def cache(tmp_path, precision="float32"):
    return TeacherCache(tmp_path / "j", precision)


def sampler(inner, cache):
    return CachedSampler(inner, cache, [32, (0,), "float32"])


def test_only_missing_completions_are_requested(tmp_path):
    inner = Sampler()
    first = sampler(inner, cache(tmp_path)).sample(PROMPTS[:2], [2, 1], 0)
    again = sampler(inner, cache(tmp_path))
    assert again.sample(PROMPTS[:2], [2, 1], 0) == first
    more = again.sample([PROMPTS[0], PROMPTS[2]], [1, 2], 1)
    assert inner.calls == [{"p0": 2, "p1": 1}, {"p0": 1, "p2": 2}]
    assert [r.completion_ids[0] for r in more] == [4, 5, 6]
    assert again.usage() == {"requests": 2, "reused": 3}
    other = sampler(inner, cache(tmp_path))
    assert len(other.sample(PROMPTS[:1], [3], 7)) == 3, "recorded completions are reused in order"
    assert len(inner.calls) == 2
    sampler(inner, cache(tmp_path)).sample(PROMPTS[:1], [1], 7, temperature=0.5)
    assert inner.calls[2:] == [{"p0": 1}], "other settings have other completions"


def test_repeated_prompt_has_different_completions(tmp_path):
    inner = Sampler()
    drawn = sampler(inner, cache(tmp_path)).sample([PROMPTS[0], PROMPTS[0]], [2, 2], 0)
    assert inner.calls == [{"p0": 4}]
    assert [r.completion_ids[0] for r in drawn] == [1, 2, 3, 4]


def test_without_a_teacher_completions_wrap_around_and_missing_ones_raise(tmp_path):
    recorded = sampler(Sampler(), cache(tmp_path)).sample(PROMPTS[:1], [4], 0)
    alone = sampler(None, cache(tmp_path))
    drawn = [alone.sample(PROMPTS[:1], [2], seed) for seed in range(3)]
    assert drawn == [recorded[:2], recorded[2:], recorded[:2]]
    with pytest.raises(
        TeacherCacheError, match=r"lacks 5 completions of 'prompt 0'\. Run seqkd pre"
    ):
        alone.sample(PROMPTS[:1], [5], 0)


@pytest.mark.parametrize("form", ["hidden", "top_k", "logprobs"])
def test_scores_are_restored_exactly_and_requested_once(tmp_path, form):
    rollouts = Sampler().sample(PROMPTS, [1] * 4, 0)
    inner = Teacher(form)
    scores = CachedTeacher(inner, cache(tmp_path), form).score(rollouts)
    again = CachedTeacher(inner, cache(tmp_path), form)
    assert again.missing(rollouts) == []
    read = again.score([*reversed(rollouts), rollouts[0]])
    assert inner.scored == [r.sample_id for r in rollouts]
    for rollout in rollouts:
        for name in ("hidden", "logprobs", "top_ids", "top_logprobs"):
            a, b = (getattr(s[rollout.sample_id], name) for s in (scores, read))
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    CachedTeacher(inner, cache(tmp_path), "another form").score(rollouts)
    assert len(inner.scored) == 8


def test_same_completion_of_another_prompt_is_scored_separately(tmp_path):
    first = Sampler().sample(PROMPTS[:1], [1], 0)[0]
    other = replace(first, sample_id="other", prompt_ids=(5, 6))
    inner = Teacher()
    CachedTeacher(inner, cache(tmp_path), "f").score([first, other])
    assert inner.scored == [first.sample_id, "other"]


def test_same_text_with_two_sample_ids_is_scored_once(tmp_path):
    first = Sampler().sample(PROMPTS[:1], [1], 0)[0]
    twin = replace(first, sample_id="twin")
    inner = Teacher()
    scores = CachedTeacher(inner, cache(tmp_path), "f").score([first, twin])
    assert len(inner.scored) == 1
    assert {s.sample_id for s in scores.values()} == {first.sample_id, "twin"}


def test_scores_of_student_samples_are_not_stored(tmp_path):
    rollout = Rollout("p", "s", (1,), (2, 3), None, "student", 3, "stop")
    inner = Teacher()
    for _ in range(2):
        assert CachedTeacher(inner, cache(tmp_path), "f").score([rollout])["s"] is not None
    assert len(inner.scored) == 2
    assert not list((tmp_path / "j").rglob("*.arrow"))


def test_bfloat16_states_are_stored_in_two_bytes(tmp_path):
    rollouts = Sampler().sample(PROMPTS[:1], [1], 0)
    CachedTeacher(Teacher("hidden"), cache(tmp_path, "bfloat16"), "hidden").score(rollouts)
    (row,) = cache(tmp_path, "bfloat16").scores.rows(
        *(next(iter(cache(tmp_path, "bfloat16").scores.places)), 0, 1)
    )
    assert len(row["hidden"].as_buffer()) == 2 * 8 * 2


def test_partial_files_are_ignored_and_damaged_files_raise(tmp_path):
    j = cache(tmp_path)
    sampler(Sampler(), j).sample(PROMPTS[:1], [1], 0)
    (file,) = (tmp_path / "j").rglob("*.arrow")
    shutil.copy(file, file.with_suffix(".partial"))
    assert len(cache(tmp_path).completions.places) == 1
    damaged = file.with_name("00000001-damaged.arrow")
    damaged.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TeacherCacheError, match=r"00000001-damaged\.arrow is damaged.*Remove it"):
        cache(tmp_path)


def test_full_disk_raises_and_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    j = cache(tmp_path)
    monkeypatch.setattr("seqkd.files.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        sampler(Sampler(), j).sample(PROMPTS[:1], [1], 0)
    assert not [p for p in (tmp_path / "j").rglob("*") if p.is_file()]


# --- identity of the teacher


def config(tiny, tmp_path, **changes):
    base = {
        "teacher": {"kind": "vllm", "model": tiny["teacher"]},
        "student": {"model": tiny["student"]},
        "teacher_cache": {"path": str(tmp_path / "cache")},
        "sampler": "teacher_cache",
        "objective": {"kind": "token_forward_kl"},
    }
    return Config.model_validate(MINIMAL | base | changes)


def test_teacher_identity_depends_on_weights_and_precision(tiny, tmp_path):
    def directory(model, **changes):
        teacher = {"kind": "vllm", "model": model, **changes}
        return open_caches(config(tiny, tmp_path, teacher=teacher), True)[1][""].directory

    copy = shutil.copytree(tiny["teacher"], tmp_path / "copy")
    assert directory(str(copy)) == directory(tiny["teacher"]), (
        "the identity does not depend on the name"
    )
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert directory(str(copy)) != directory(tiny["teacher"])
    assert directory(tiny["teacher"], precision="bfloat16") != directory(tiny["teacher"])


def test_recorded_teacher_replaces_a_missing_checkpoint(tiny, tmp_path):
    moved = str(shutil.copytree(tiny["teacher"], tmp_path / "moved"))
    there = config(tiny, tmp_path, teacher={"kind": "vllm", "model": moved})
    with pytest.raises(
        TeacherCacheError, match=r"has no entries for the teacher .*moved.* contains nothing"
    ):
        open_caches(there, teacher_here=False)
    keep_teachers(there, open_caches(there, teacher_here=True)[1])
    head = load_head(moved, "float32")
    shutil.rmtree(moved)
    resolved, caches = open_caches(there, teacher_here=False)
    j = caches[""]
    assert resolved.teacher.model == j.teacher != moved
    assert torch.equal(load_head(j.teacher, "float32").weight, head.weight)
    other = config(tiny, tmp_path, teacher={"kind": "vllm", "model": tiny["student"]})
    with pytest.raises(TeacherCacheError, match=r"it contains .*moved"):
        open_caches(other, teacher_here=False)


def flip(file, seed):
    """Flip one bit of a file."""
    content, generator = bytearray(file.read_bytes()), random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_in_the_recorded_teacher(tiny, tmp_path, name, here):
    """A run without a teacher reads the recorded files, even if the checkpoint is on this machine.
    Recording again corrects them."""
    model = str(shutil.copytree(tiny["teacher"], tmp_path / "teacher"))
    c = config(tiny, tmp_path, teacher={"kind": "vllm", "model": model})
    _, caches = open_caches(c, teacher_here=True)
    keep_teachers(c, caches)
    copy = Path(caches[""].teacher)
    intact = {file.name: file.read_bytes() for file in copy.iterdir()}
    away = tmp_path / ("teacher" if here else "away")
    shutil.move(model, away)
    for seed in range(4):
        flip(copy / name, seed)
        with pytest.raises(TeacherCacheError, match="is missing or damaged: it does not") as caught:
            open_caches(c, teacher_here=False)
        assert str(copy / name) in str(caught.value)
        if here:
            keep_teachers(c, caches)
            assert {file.name: file.read_bytes() for file in copy.iterdir()} == intact
        else:
            (copy / name).write_bytes(intact[name])
        open_caches(c, teacher_here=False)
    (copy / name).unlink()
    with pytest.raises(TeacherCacheError, match=f"{name} is missing or damaged"):
        open_caches(c, teacher_here=False)


def test_a_copy_without_digests_is_damaged(tiny, tmp_path):
    c = config(tiny, tmp_path)
    _, caches = open_caches(c, teacher_here=True)
    keep_teachers(c, caches)
    description = caches[""].directory / "teacher.json"
    description.write_text(json.dumps(c.teacher.describe()))
    with pytest.raises(TeacherCacheError, match="is missing or damaged"):
        open_caches(c, teacher_here=False)
    description.write_text("{")
    with pytest.raises(TeacherCacheError, match=r"teacher\.json is damaged"):
        open_caches(c, teacher_here=False)
    keep_teachers(c, caches)
    open_caches(c, teacher_here=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_teacher_with_other_weights_than_the_recorded_one(tiny, tmp_path, capsys, seed):
    """Runs that share a cache report it: a run with the teacher and a run without it."""
    model = shutil.copytree(tiny["teacher"], tmp_path / "teacher")
    c = config(tiny, tmp_path, teacher={"kind": "vllm", "model": str(model)})
    keep_teachers(c, open_caches(c, teacher_here=True)[1])
    open_caches(c, teacher_here=True)
    assert capsys.readouterr().err == ""
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    body = 8 + int.from_bytes(content[:8], "little")
    content[random.Random(seed).randrange(body, len(content))] ^= 1
    weights.write_bytes(content)
    changed = f"model.safetensors of {model} has changed since the teacher was recorded."
    with pytest.raises(TeacherCacheError) as caught:
        open_caches(c, teacher_here=False)
    assert changed in str(caught.value)
    open_caches(c, teacher_here=True)
    assert changed in " ".join(capsys.readouterr().err.split())


def test_runs_that_start_at_the_same_moment_share_a_cache(tiny, tmp_path):
    for attempt in range(5):
        c = config(tiny, tmp_path / str(attempt))
        caches = [open_caches(c, teacher_here=True)[1] for _ in range(4)]
        start = threading.Barrier(len(caches))

        def begin(opened, c=c, start=start):
            start.wait()
            keep_teachers(c, opened)

        with ThreadPoolExecutor(len(caches)) as pool:
            list(pool.map(begin, caches))
        directory = caches[0][""].directory
        content = json.loads((directory / "teacher.json").read_text())
        assert content.items() >= c.teacher.describe().items()
        assert not list(directory.rglob("*.partial"))


def test_missing_entries_are_counted_before_a_run_starts(tiny, tmp_path):
    c = config(tiny, tmp_path, steps=2, prompts_per_step=1, rollout={"samples_per_prompt": 1})
    checked = SimpleNamespace(
        train=PROMPTS[:2], heldout=PROMPTS[2:3], corpus=[], stop_ids=(0,), vocabulary=320
    )
    j = cache(tmp_path)
    with pytest.raises(
        TeacherCacheError, match="completions of 3 prompts and scores of 0 completions"
    ):
        check_recorded(c, {"": j}, checked)
    settings = [c.rollout.max_tokens, (0,), "float32"]
    rollouts = CachedSampler(Sampler(), j, settings).sample(PROMPTS[:3], [1] * 3, 0)
    with pytest.raises(
        TeacherCacheError, match="completions of 0 prompts and scores of 3 completions"
    ):
        check_recorded(c, {"": j}, checked)
    CachedTeacher(Teacher("hidden"), j, score_form(c.teacher, 320)).score(rollouts)
    check_recorded(c, {"": j}, checked)


@pytest.mark.parametrize(
    ("teacher", "size"),
    [({}, 64 * 4), ({"precision": "bfloat16"}, 64 * 2), ({"scores": "logprobs"}, 4),
     ({"scores": "top_k", "top_k": 3}, 4 + 3 * 4 + 4 * 4)],
)  # fmt: skip
def test_size_of_a_token_on_disk(tiny, tmp_path, teacher, size):
    teacher = {"kind": "hf", "model": tiny["teacher"]} | teacher
    c = config(tiny, tmp_path, teacher=teacher, objective={"kind": "sequence_forward_kl"})
    assert bytes_per_token(c.teacher) == size
