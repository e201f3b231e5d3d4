"""Several teachers: the choice of a prompt's teacher, and dispatch to it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from seqkd.checks.preflight import check
from seqkd.config.run import Config, load
from seqkd.errors import ConfigError
from seqkd.learner import batching
from seqkd.types import Prompt, Rollout, TeacherScore
from seqkd.workers import MultiSampler, MultiTeacher
from tests.unit.checks.test_preflight import config  # noqa: F401
from tests.unit.config.test_config import MINIMAL

MEMBERS = {
    "math": {"teacher": {"kind": "vllm", "model": "m"}, "tags": ["math"]},
    "large": {"teacher": {"kind": "hf", "model": "l"}, "weight": 3.0},
    "small": {"teacher": {"kind": "vllm", "model": "s"}, "tags": ["chat", ""]},
}
SEVERAL = {"kind": "multi", "teachers": MEMBERS}
DATA = MINIMAL["data"] | {"tag_key": "topic"}


def several(**changes):
    chosen = SEVERAL | {"teachers": MEMBERS | changes}
    return Config.model_validate(MINIMAL | {"teacher": chosen, "data": DATA})


def test_prompts_are_distributed_by_tag_and_weight():
    c = several()
    chosen = {
        tag: Counter(c.teacher.choose(tag, str(i)) for i in range(10_000))
        for tag in ("math", "law")
    }
    assert chosen["law"] == {"large": 10_000}
    assert chosen["math"].keys() == {"math", "large"}
    # 3 : 1, with a standard deviation of sqrt(10,000 x 0.75 x 0.25) = 43.
    assert abs(chosen["math"]["large"] - 7_500) < 4 * 43
    assert c.teacher.choose("math", "7") == several().teacher.choose("math", "7")


def test_a_single_teacher_has_every_prompt():
    c = Config.model_validate(MINIMAL)
    assert (c.teacher.choose("math", "7"), list(c.teachers)) == ("", [""])


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"small": {"teacher": {"kind": "hf", "model": "s", "scores": "top_k"}}}, DATA,
         "different values of scores"),
        ({}, MINIMAL["data"], "data.tag_key is not set"),
        ({"small": {"teacher": SEVERAL}}, DATA, "kind"),
        ({"small": MEMBERS["small"] | {"weight": 0}}, DATA, "greater than 0"),
    ],
)  # fmt: skip
def test_invalid_teachers_are_rejected(tmp_path, changes, data, message):
    file = tmp_path / "c.yaml"
    teacher = SEVERAL | {"teachers": MEMBERS | changes}
    file.write_text(json.dumps(MINIMAL | {"teacher": teacher, "data": data}))
    with pytest.raises(ConfigError, match=message):
        load(file)


class Sampler:
    def __init__(self, name):
        self.name = name

    def sample(self, prompts, samples, seed, temperature, top_p, finished):
        return [
            Rollout(p.prompt_id, f"{self.name}/{p.prompt_id}/{i}", p.token_ids, (1,), None,
                    "teacher", 0, "stop", p.tag)
            for p, n in zip(prompts, samples, strict=True)
            for i in range(n)
        ]  # fmt: skip

    def usage(self):
        return {"requests": 2}


class Teacher:
    def __init__(self, name):
        self.name = name

    def score(self, rollouts):
        return {r.sample_id: TeacherScore(r.sample_id, teacher=self.name) for r in rollouts}

    def usage(self):
        return {"requests": 1, "scored": 5}


def test_prompts_are_completed_and_scored_by_their_teacher_in_order():
    def choose(tag, prompt_id):
        return tag

    prompts = [Prompt(str(i), (i,), "", tag="ab"[i % 2]) for i in range(5)]
    samplers = MultiSampler({n: Sampler(n) for n in "ab"}, choose)
    drawn = samplers.sample(prompts, [1, 2, 0, 1, 2], 0)
    assert [r.sample_id for r in drawn] == ["a/0/0", "b/1/0", "b/1/1", "b/3/0", "a/4/0", "a/4/1"]
    teachers = MultiTeacher({n: Teacher(n) for n in "ab"}, choose)
    scores = teachers.score(drawn)
    assert all(scores[r.sample_id].teacher == r.sample_id[0] for r in drawn)
    assert samplers.usage() == {"requests": 4}
    assert teachers.usage() == {"requests": 2, "scored": 10}
    plan = batching.partition(drawn, scores, ranks=2, layout=batching.Layout(20))
    batches = [batch for part in plan for batch in part if batch]
    assert sorted(r.sample_id for batch in batches for r in batch) == sorted(scores)
    assert all(len({scores[r.sample_id].teacher for r in batch}) == 1 for batch in batches)


def test_a_tag_without_a_teacher_is_rejected(config, tiny, tmp_path):  # noqa: F811
    rows = [{"prompt": "one", "topic": "math"}, {"prompt": "two", "topic": "law"}]
    file = tmp_path / "tagged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = {"m": {"teacher": {"kind": "hf", "model": tiny["teacher"]}, "tags": ["math"]}}
    overrides = [
        f"teacher={json.dumps({'kind': 'multi', 'teachers': members})}",
        *(f"data.path={file}", "data.tag_key=topic", "evaluation.prompts=0"),
    ]
    with pytest.raises(ConfigError, match=r"no teacher accepts rows with topic 'law'\. Add the"):
        check(config(*overrides))
    members["all"] = {"teacher": {"kind": "hf", "model": "/nowhere"}}
    overrides[0] = f"teacher={json.dumps({'kind': 'multi', 'teachers': members})}"
    with pytest.raises(
        ConfigError, match=r"teacher\.teachers\.all: teacher\.model: '/nowhere' does"
    ):
        check(config(*overrides))


def test_early_completions_are_reported_with_the_index_of_their_prompt():
    class Early:
        def sample(self, prompts, samples, seed, temperature, top_p, finished):
            drawn = [
                Rollout(p.prompt_id, p.prompt_id, p.token_ids, (1,), None, "teacher", 0, "stop")
                for p in prompts
            ]
            for i in reversed(range(len(drawn))):
                finished(i, drawn[i])
            return drawn

    prompts = [Prompt(str(i), (i,), "", tag="ab"[i % 2]) for i in range(5)]
    sampler, reported = MultiSampler({"a": Early(), "b": Early()}, lambda tag, _: tag), []
    sampler.sample(prompts, [1] * 5, 0, finished=lambda i, r: reported.append((i, r.prompt_id)))
    assert sorted(reported) == [(i, str(i)) for i in range(5)]
