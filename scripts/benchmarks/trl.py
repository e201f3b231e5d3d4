"""Benchmark of complete steps of seqkd and of TRL on the same models, prompts, lengths and
divergence.

Each trainer is a process that is suspended while the other takes a step, so both run under the same
conditions. As a main module, this file is the process of TRL's DistillationTrainer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from actors.local_cluster import ENVIRONMENT
from scripts.benchmarks.rows import Row
from scripts.benchmarks.runs import COMPILED, ROOT, SPLIT, Training, three_slots, trained
from seqkd.config import run as configuration
from seqkd.config.base import Precision
from seqkd.config.run import Config


def compare(file: str, repetitions: int, precision: Precision = "float32") -> Iterator[Row]:
    """Measure a step as configured, a compiled step, and a compiled step that prefetches, the last
    with one core per role as in :func:`runs.ahead`. TRL runs with its defaults. In float32 it also
    runs once with :func:`actors.cpu_matmul.use_onednn`, which TRL does not offer."""
    trainer = "TRL's DistillationTrainer"
    step = Row("end to end", f"a step, {precision}", "s", trainer, 1 / 1.6)
    compiled = Row("end to end", "the same, compiled", "s", trainer, 1 / 1.6)
    ahead = Row("end to end", "and prefetched", "s", trainer, 1 / 2.5)
    onednn = Row("end to end", "the same", "s", "TRL with oneDNN's products too")
    learner = Row("end to end", f"memory of the learner, {precision}", "GiB", "TRL's process", 1.0)
    total = Row("end to end", f"memory of all processes, {precision}", "GiB", "TRL's process")
    config = configuration.load(file)
    plain = [f"{role}.precision={precision}" for role in ("learner", "rollout", "teacher")]
    prefetched = [*plain, *COMPILED, *SPLIT, "rollout.max_off_policy_steps=1"]
    cases: list[tuple[Row, list[str], bool]] = [
        (step, plain, False), (compiled, [*plain, *COMPILED], False), (ahead, prefetched, False),
    ]  # fmt: skip
    if precision == "float32":  # for bfloat16 torch itself uses oneDNN
        cases.append((onednn, prefetched, True))
    with tempfile.TemporaryDirectory() as folder:
        spec = _spec(config, folder, precision)
        for row, overrides, use_onednn in cases:
            for _ in range(repetitions):
                peaks = _alternate(row, file, config, overrides, {**spec, "onednn": use_onednn})
                if row is step:
                    learner.add(peaks["learner"], peaks["trl"])
                    total.add(peaks["all"], peaks["trl"])
            yield from (step, learner, total) if row is step else (row,)


def compare_bfloat16(file: str, repetitions: int) -> Iterator[Row]:
    """Measure the same in bfloat16."""
    return compare(file, repetitions, "bfloat16")


def _alternate(
    row: Row, file: str, config: Config, overrides: Sequence[str], spec: Mapping[str, Any]
) -> dict[str, float]:
    """Add all steps to ``row`` except the first, which also compiles and allocates, and the last,
    which exports. Returns peak memory in GiB: "learner", "all" (seqkd's processes), and "trl"."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        environment: Mapping[str, str] = {}
        if set(SPLIT) <= set(overrides):
            overrides = [*overrides, f"cluster={stack.enter_context(three_slots())}"]
            environment = ENVIRONMENT
        seqkd = stack.enter_context(trained(file, overrides, environment))
        seqkd.next_step()
        seqkd.roots = psutil.Process().children()  # including the head of the cluster
        seqkd.pause()
        trl = stack.enter_context(_start_trl({**spec, "directory": folder}))
        trl.next_step()
        trl.pause()
        for _ in range(config.steps - 2):
            row.add(seqkd.turn(), trl.turn())
        for training in (seqkd, trl):
            training.resume()
            training.finish()
        peaks = {"learner": seqkd.memory("learner 0"), "all": sum(seqkd.peak.values())}
        return peaks | {"trl": sum(trl.peak.values())}


def _start_trl(spec: Mapping[str, Any]) -> Training:
    command = ("-m", "scripts.benchmarks.trl", json.dumps(spec))
    environment = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    return Training(command, Path(spec["directory"]) / "steps", environment, ROOT)


def _spec(config: Config, folder: str, precision: Precision) -> dict[str, Any]:
    """Return the specification of TRL's process, with the same work as the configuration."""
    from seqkd.checks import preflight
    from seqkd.data.stream import PromptStream
    from seqkd.models.export import materialize_student
    from seqkd.models.loading import expand

    teacher = config.teachers[""].local
    assert teacher is not None
    checked = preflight.check(config)
    prompts = PromptStream(checked.train, config.seed).take(config.prompts_per_step * config.steps)
    return {
        "student": materialize_student(config.student, "float32", Path(folder) / "student"),
        "teacher": expand(teacher.model),
        "prompts": [[{"role": r, "content": c} for r, c in p.messages] for p in prompts],
        "batch": config.prompts_per_step,
        "steps": config.steps,
        "tokens": config.rollout.max_tokens,
        "lr": config.learner.lr,
        "precision": precision,
        "threads": config.learner.cpus,
    }


def train(spec: Mapping[str, Any]) -> None:
    """Train with TRL. A line is appended to the file ``directory``/steps after each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from actors.cpu_matmul import use_onednn

    torch.set_num_threads(spec["threads"])
    if spec["onednn"]:
        use_onednn()

    class StepFile(TrainerCallback):
        """Record the end of each step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            with (Path(spec["directory"]) / "steps").open("a") as file:
                file.write("\n")

    arguments = DistillationConfig(
        output_dir=f"{spec['directory']}/trl",
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        max_completion_length=spec["tokens"],
        learning_rate=spec["lr"],
        beta=1.0,
        bf16=spec["precision"] == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        model_init_kwargs={"dtype": spec["precision"]},
        teacher_model_init_kwargs={"dtype": spec["precision"]},
    )
    trainer = DistillationTrainer(
        model=spec["student"],
        teacher_model=spec["teacher"],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": m} for m in spec["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(spec["teacher"]),
        callbacks=[StepFile()],
    )
    trainer.train()


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
