"""Log of the completions and scores of a run since its last checkpoints.

Completions and scores are on disk before they are trained on. If the learner or the whole run is
lost, training continues from a checkpoint. The steps since then are repeated on the same
completions and scores, without sampling or scoring again. Entries that no kept checkpoint needs are
removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from seqkd.config.run import Config
from seqkd.protocols import Finished, Sampler, Seed, StudentSampler, Teacher
from seqkd.storage.arrow_store import ArrowStore
from seqkd.storage.run_directory import Resumption
from seqkd.teachers.cache import TeacherCache, address_of, score_form
from seqkd.types import Prompt, Rollout, TeacherScore, WeightVersion, rollout_from
from seqkd.workers import Workers

SAMPLES = pa.schema(
    [
        ("address", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float64())),
        ("source", pa.string()),
        ("policy_version", pa.int64()),
        ("finish_reason", pa.string()),
        ("tag", pa.string()),
    ]
)
FIELDS = SAMPLES.names[1:]
"""Fields of a rollout."""
FOLDER = "replay_log"
"""Folder of the log in the run directory."""
SAMPLED, SCORED = "samples", "teacher"


def discard(directory: Path, resumption: Resumption) -> None:
    """Remove completions and scores that this start of a run must not train on. For a new run these
    are all. For a resumed run these are the training samples, if a changed key affects the next
    steps."""
    if not resumption.exists:
        shutil.rmtree(directory, ignore_errors=True)
    elif resumption.trajectory:
        for name in (SAMPLED, SCORED):
            shutil.rmtree(directory / name, ignore_errors=True)


class ReplayLog:
    """Samples and scores of one run."""

    def __init__(self, directory: Path, config: Config) -> None:
        self.directory, self.room = directory, int(config.checkpoints.replay_log_gib * 2**30)
        self.samples = ArrowStore(directory / SAMPLED, SAMPLES, damaged="drop")
        self.scores = {
            name: TeacherCache(directory / SCORED / name, teacher.precision, damaged="drop")
            for name, teacher in config.teachers.items()
        }
        self.kept = 0
        """Bytes of scores added by this process since the last checkpoint."""

    def wrap(self, workers: Workers, config: Config, vocabulary: int) -> Workers:
        """Return ``workers`` that record the student's samples and the teachers' samples and
        scores. Teacher output that a teacher cache stores is not recorded."""
        cached = config.teacher_cache is not None
        samplers = workers.teacher_samplers
        return replace(
            workers,
            student=RecordedStudent(workers.student, self.samples),
            teacher_samplers=samplers
            if cached
            else {n: RecordedSampler(s, self.samples, f"teacher {n}") for n, s in samplers.items()},
            teachers={
                name: RecordedTeacher(
                    teacher, self, name, score_form(config.teachers[name], vocabulary),
                    student_only=cached,
                )
                for name, teacher in workers.teachers.items()
            },
        )  # fmt: skip

    def position(self) -> dict[str, int]:
        """Return the position for a checkpoint, so that older entries can be removed later."""
        return {name: shards.position for name, shards in self._shards.items()}

    def resume(self, position: Mapping[str, int]) -> None:
        """Continue from a checkpoint at ``position``. It is above the position of the files if no
        entry was added since the checkpoint."""
        for name, shards in self._shards.items():
            shards.position = max(shards.position, position.get(name, 0))

    def clear(self) -> None:
        """Remove all entries."""
        self.prune(self.position())

    def prune(self, position: Mapping[str, int]) -> None:
        """Remove entries from before ``position``."""
        for name, shards in self._shards.items():
            shards.prune(position.get(name, 0))
        self.kept = 0

    def dropped(self) -> list[str]:
        """Return one line per damaged file that was dropped. Each line is returned only once."""
        names = [name for shards in self._shards.values() for name in shards.dropped]
        for shards in self._shards.values():
            shards.dropped.clear()
        return [
            f"{name} in {self.directory} is damaged. Its entries will be computed again."
            for name in names
        ]

    @property
    def _shards(self) -> dict[str, ArrowStore]:
        scores = {f"teacher {name}": cache.scores for name, cache in self.scores.items()}
        return {"samples": self.samples, **scores}


class RecordedSampler:
    """Sampler that records completions. The same call returns the same completions again."""

    def __init__(self, inner: Sampler, samples: ArrowStore, who: str) -> None:
        self.inner, self.samples, self.who = inner, samples, who

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: Seed,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """See :class:`seqkd.protocols.Sampler`."""
        asked = [(p.token_ids, int(n)) for p, n in zip(prompts, samples, strict=True)]
        # The seed identifies the step, and therefore the student's weights.
        address = address_of([self.who, seed, temperature, top_p, asked])
        if address in self.samples:
            count = self.samples.count(address)
            rows = self.samples.rows(address, 0, count)
            return [rollout_from({n: row[n].as_py() for n in FIELDS}) for row in rows]
        drawn = self.inner.sample(prompts, samples, seed, temperature, top_p, finished)
        self.samples.append([{"address": address, **asdict(rollout)} for rollout in drawn])
        return drawn

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Sampler`."""
        return self.inner.usage()


class RecordedStudent(RecordedSampler):
    """Recorded sampler of the student, whose weights change."""

    inner: StudentSampler

    def __init__(self, inner: StudentSampler, samples: ArrowStore) -> None:
        super().__init__(inner, samples, "student")

    @property
    def policy_version(self) -> int | None:
        """See :class:`seqkd.protocols.StudentSampler`."""
        return self.inner.policy_version

    def load(self, version: WeightVersion) -> None:
        """See :class:`seqkd.protocols.StudentSampler`."""
        self.inner.load(version)

    def mark_stale(self) -> None:
        """See :class:`seqkd.protocols.StudentSampler`."""
        self.inner.mark_stale()

    def logprobs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """See :class:`seqkd.protocols.StudentSampler`."""
        return self.inner.logprobs(token_ids)


class RecordedTeacher:
    """Teacher that records scores. The same call returns the same scores again.

    A call is recorded as a whole. Its scores do not replace those of another call with some of the
    same sequences, because the last bits of a score depend on the other sequences of its batch.
    """

    def __init__(
        self, inner: Teacher, log: ReplayLog, name: str, form: str, student_only: bool
    ) -> None:
        """Wrap ``inner``. With ``student_only``, calls without student samples are not recorded,
        because a teacher cache stores their scores."""
        self.inner, self.log, self.name, self.form = inner, log, name, form
        self.student_only = student_only

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`."""
        if self.student_only and all(r.source != "student" for r in rollouts):
            return self.inner.score(rollouts)
        texts = [(r.prompt_ids, r.completion_ids) for r in rollouts]
        address, cache = address_of([self.form, texts]), self.log.scores[self.name]
        if address in cache.scores:
            read = [cache.read_score(address, r.sample_id, i) for i, r in enumerate(rollouts)]
            return {score.sample_id: replace(score, teacher=self.name) for score in read}
        scores = self.inner.score(rollouts)
        if self.log.kept < self.log.room:
            self.log.kept += sum(map(_size, scores.values()))
            cache.add_scores([(address, scores[r.sample_id]) for r in rollouts])
        return scores

    def usage(self) -> dict[str, int]:
        """See :class:`seqkd.protocols.Teacher`."""
        return self.inner.usage()


def _size(score: TeacherScore) -> int:
    tensors = (score.hidden, score.logprobs, score.top_ids, score.top_logprobs)
    return sum(t.nbytes for t in tensors if t is not None)
