"""Sampling of the held-out completions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actors.groups import RolloutGroup
from seqkd.cli import evaluate
from seqkd.cli.main import main
from seqkd.console import Progress
from seqkd.evaluation.heldout import prompt_seeds
from seqkd.teachers.cache import CachedSampler, TeacherCache
from seqkd.types import Prompt, Rollout

PROMPTS = [Prompt(f"p{i}", (i, 9), f"prompt {i}") for i in range(40)]


class Pool:
    """Two engines whose completions contain their sampling seed."""

    def __init__(self, name):
        self.name, self.actors, self.paid = name, [None, None], False

    def stream(self, method, calls, arrived, what):
        for engine, (prompts, seeds, samples, _, temperature, top_p) in enumerate(calls):
            assert (temperature, top_p) == (1.0, 1.0)
            for place, prompt in enumerate(prompts):
                for index in range(samples[place]):
                    seed = seeds[place] + index
                    rollout = Rollout(
                        prompt.prompt_id, f"{prompt.prompt_id}/{seed}", prompt.token_ids,
                        (seed,), (0.0,), self.name, 0, "length",
                    )  # fmt: skip
                    arrived(engine, (place, index, rollout))


def seeds_of(rollouts):
    return {(r.prompt_id, i): r.completion_ids[0] for i, r in enumerate(rollouts)}


def generated(prompts, samples, tmp_path):
    """Return the seed of each completion of ``seqkd evaluate``, by prompt."""
    workers = SimpleNamespace(student=RolloutGroup(Pool("student"), 8))
    config = SimpleNamespace(evaluation=SimpleNamespace(samples_per_prompt=samples), seed=3)
    checked = SimpleNamespace(heldout=prompts, vocabulary=99)
    outputs = evaluate.generate(config, "student", workers, checked, False, tmp_path, Progress())
    seeds = {}
    for rollout in outputs["student"].answers.rollouts:
        seeds.setdefault(rollout.prompt_id, []).append(rollout.completion_ids[0])
    return seeds


@pytest.fixture(autouse=True)
def without_log(monkeypatch):
    class Log:
        def __init__(self, *_):
            pass

        def wrap(self, workers, *_):
            return workers

    monkeypatch.setattr("seqkd.training.replay_log.ReplayLog", Log)


def test_every_completion_of_an_evaluation_has_its_own_seed(tmp_path):
    seeds = [seed for each in generated(PROMPTS, 2, tmp_path).values() for seed in each]
    assert len(seeds) == len(set(seeds)) == 80, "more prompts than are sampled together"


def test_seeds_of_a_prompt_do_not_depend_on_the_other_prompts(tmp_path):
    everything = generated(PROMPTS, 1, tmp_path)
    for prompts in (PROMPTS[::-1], PROMPTS[7:9], PROMPTS[35:]):
        some = generated(prompts, 1, tmp_path)
        assert some == {p.prompt_id: everything[p.prompt_id] for p in prompts}


def test_student_and_teacher_have_different_seeds():
    seeds = prompt_seeds(PROMPTS, 3)
    drawn = [
        seeds_of(RolloutGroup(Pool(name), 8).sample(PROMPTS, [1] * 40, seeds))
        for name in ("student", "teacher")
    ]
    assert not set(drawn[0].values()) & set(drawn[1].values())
    assert prompt_seeds(PROMPTS, 4) != seeds


def test_further_completions_of_a_recorded_prompt_are_new(tmp_path):
    """An interrupted evaluation that continues with more samples must not record the same
    completions again."""
    cache = TeacherCache(tmp_path / "cache", "float32")
    group, seeds = RolloutGroup(Pool("teacher"), 8), prompt_seeds(PROMPTS[:3], 3)
    CachedSampler(group, cache, []).sample(PROMPTS[:3], [1] * 3, seeds)
    more = CachedSampler(group, cache, []).sample(PROMPTS[:3], [3] * 3, seeds)
    assert len({r.completion_ids for r in more}) == 9


@pytest.mark.parametrize("override", ["rollout.temperature=0.7", "rollout.top_p=0.9"])
def test_another_sampling_distribution_is_refused(override, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["evaluate", str(tmp_path), override]) == 2
    key, _, value = override.partition("=")
    assert f"{key} {value} applies to training only. Remove it" in capsys.readouterr().err
