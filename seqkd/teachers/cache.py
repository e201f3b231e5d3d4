"""On-disk cache of a teacher's completions and scores, so that nothing is requested twice.

Completions and scores are addressed by a hash of the request (token ids and sampling settings),
in a directory for each teacher identity. A live run reads existing entries from the cache and adds
missing ones. With ``sampler: teacher_cache``, a run only reads the cache (score first, train
later); the same code runs on the same values. The cache also stores the teacher's output head and
tokenizer, so the teacher's checkpoint is not required. Student samples are not stored, because
they do not recur (:mod:`seqkd.training.replay_log` stores them temporarily).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from seqkd.config.run import Config
from seqkd.config.teacher import SingleTeacherConfig
from seqkd.console import print_message
from seqkd.errors import TeacherCacheError
from seqkd.files import atomic_directory, atomic_write, disk_errors
from seqkd.models.loading import dtype_of, load_config
from seqkd.models.model_files import checkpoint_digests, digests_of
from seqkd.models.output_head import export_head
from seqkd.protocols import Finished, Sampler, Seed, Teacher
from seqkd.storage.arrow_store import ArrowStore
from seqkd.types import Prompt, Rollout, TeacherScore
from seqkd.workers import Workers

COMPLETIONS = pa.schema(
    [
        ("address", pa.string()),
        ("sample_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
    ]
)
TENSORS = {"hidden": None, "logprobs": torch.float32, "top_ids": torch.int32,
           "top_logprobs": torch.float32}  # fmt: skip
"""Fields of a score and their types on disk; hidden states have the teacher's precision."""
SCORES = pa.schema(
    [
        ("address", pa.string()),
        ("tokens", pa.int32()),
        *((name, pa.large_binary()) for name in TENSORS),
    ]
)


class TeacherCache:
    """Completions and scores of one teacher."""

    def __init__(
        self, directory: Path, precision: str, damaged: Literal["refuse", "drop"] = "refuse"
    ) -> None:
        self.directory = directory
        self.hidden_dtype = dtype_of(precision)
        self.completions = ArrowStore(directory / "completions", COMPLETIONS, damaged)
        self.scores = ArrowStore(directory / "scores", SCORES, damaged)

    @property
    def teacher(self) -> str:
        """Model directory with only the teacher's configuration, tokenizer and output head."""
        return str(self.directory / "teacher")

    def read_score(self, address: str, sample_id: str, index: int = 0) -> TeacherScore:
        """Read a score under ``address`` as the score of ``sample_id``."""
        (row,) = self.scores.rows(address, index, index + 1)
        tokens = row["tokens"].as_py()
        tensors: dict[str, Any] = {n: self._tensor(n, row[n], tokens) for n in TENSORS}
        return TeacherScore(sample_id, **tensors)

    def add_scores(self, scores: Sequence[tuple[str, TeacherScore]]) -> None:
        """Store (address, score) pairs."""
        self.scores.append([self._score_row(address, score) for address, score in scores])

    def commit(self) -> None:
        """Keep everything added so far."""
        self.completions.commit()
        self.scores.commit()

    def rollback(self) -> None:
        """Remove everything added since the last commit."""
        self.completions.rollback()
        self.scores.rollback()

    def _score_row(self, address: str, score: TeacherScore) -> dict[str, Any]:
        tensors = {n: getattr(score, n) for n in TENSORS}
        tokens = next((len(t) for t in tensors.values() if t is not None), 0)
        return {"address": address, "tokens": tokens} | {
            n: None if t is None else _bytes(t.to(self._dtype(n))) for n, t in tensors.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        return TENSORS[name] or self.hidden_dtype

    def _tensor(self, name: str, value: Any, tokens: int) -> Tensor | None:
        if not value.is_valid:
            return None
        # Copied, because the file is mapped read-only.
        flat = torch.frombuffer(bytearray(value.as_buffer()), dtype=self._dtype(name))
        return flat if name == "logprobs" else flat.view(tokens, -1)


def open_caches(config: Config, teacher_here: bool) -> tuple[Config, dict[str, TeacherCache]]:
    """Open the caches of all teachers, by name; empty if ``teacher_cache.path`` is unset.

    Without ``teacher_here``, the returned configuration names the recorded model directory of each
    local teacher instead of its checkpoint. Raises TeacherCacheError.
    """
    if config.teacher_cache is None:
        return config, {}
    root = Path(config.teacher_cache.path).expanduser().absolute()
    caches = {name: _open(root, t, teacher_here) for name, t in config.teachers.items()}
    if not teacher_here:
        recorded = {
            name: teacher.model_copy(update={"model": caches[name].teacher})
            if teacher.local
            else teacher
            for name, teacher in config.teachers.items()
        }
        config = config.with_teachers(recorded)
    return config, caches


def _open(root: Path, teacher: SingleTeacherConfig, here: bool) -> TeacherCache:
    checkpoint, spec = checkpoint_of(teacher, here), teacher.describe()
    directory = None if checkpoint is None else root / identity_of(teacher, checkpoint)
    if directory is None or not (directory / "teacher.json").exists():
        recorded = dict(_descriptions(root, skip_damaged=here))
        named = [path for path, other in recorded.items() if other.spec == spec]
        changed = ""
        if checkpoint and named:
            changed = f" {', '.join(_differing(recorded[named[-1]].checkpoint, checkpoint))} of "
            changed += f"{teacher.model} has changed since the teacher was recorded."
        if here and changed:
            print_message(
                "warning",
                f"teacher_cache.path: {root} has entries for the teacher {spec}, but"
                f"{changed} The entries are not used. Restore the file to use them.",
            )
        elif not here and (checkpoint is not None or len(named) != 1):
            contents = "; ".join(str(other.spec) for other in recorded.values()) or "nothing"
            raise TeacherCacheError(
                f"teacher_cache.path: {root} has no entries for the teacher {spec}; it contains "
                f"{contents:.500}.{changed} Configure a recorded teacher, or run seqkd precompute "
                "with this configuration first."
            )
        elif not here:  # The checkpoint is not on this machine, so only its name can be matched.
            directory = named[0]
    assert directory is not None, "a required checkpoint has an identity"
    cache = TeacherCache(directory, teacher.precision)
    if teacher.local and not here and (damaged := _damaged_copy(cache)):
        raise TeacherCacheError(
            f"teacher_cache.path: {damaged} is missing or damaged: it does not have the recorded "
            "digest. Run seqkd precompute with the same configuration, which writes it again."
        )
    return cache


class Description(NamedTuple):
    """Content of ``teacher.json``."""

    spec: dict[str, Any]
    """See :meth:`seqkd.config.teacher.SingleTeacherConfig.describe`."""
    checkpoint: dict[str, str]
    """Digests of the checkpoint's config and weights, by file name. Empty for an endpoint."""
    copy: dict[str, str]
    """Digests of the files in :attr:`TeacherCache.teacher`, by file name."""


def _description(file: Path) -> Description:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            checkpoint, copy = (content.pop(name, {}) for name in ("checkpoint", "copy"))
            if isinstance(checkpoint, dict) and isinstance(copy, dict):
                return Description(content, checkpoint, copy)
        error: object = "it is not a JSON object of the expected form"
    except (OSError, ValueError, RecursionError) as caught:
        error = caught
    raise TeacherCacheError(
        f"teacher_cache.path: {file} is damaged: {error!s:.200}. Remove it and run "
        "seqkd precompute with the same configuration."
    )


def _descriptions(root: Path, skip_damaged: bool) -> Iterator[tuple[Path, Description]]:
    """Yield the directory and the description of every teacher, the one written last at the end."""
    files = sorted(root.glob("*/teacher.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        with suppress(*[TeacherCacheError] if skip_damaged else []):
            yield file.parent, _description(file)


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _damaged_copy(cache: TeacherCache) -> Path | None:
    """Return a file of :attr:`TeacherCache.teacher` that differs from its recorded digest."""
    recorded = _description(cache.directory / "teacher.json").copy
    copy = Path(cache.teacher)
    differing = _differing(recorded, _digests(copy))
    # A directory without any record is damaged, too.
    return copy / differing[0] if differing else None if recorded else copy


def _is_kept(cache: TeacherCache, teacher: SingleTeacherConfig) -> bool:
    try:
        _description(cache.directory / "teacher.json")
        return not (teacher.local and _damaged_copy(cache))
    except TeacherCacheError:
        return False


def _digests(directory: Path) -> dict[str, str]:
    files = digests_of(directory.glob("*"), "teacher_cache.path")
    return {file.name: digest for file, digest in files.items()}


def checkpoint_of(teacher: SingleTeacherConfig, here: bool) -> dict[str, str] | None:
    """Return the digests of the teacher's checkpoint, which are empty for an endpoint. None if the
    checkpoint is not on this machine and ``here`` is false."""
    if teacher.local is None:
        return {}
    return checkpoint_digests(teacher.model, "teacher.model", download=here)


def identity_of(teacher: SingleTeacherConfig, checkpoint: Mapping[str, str]) -> str:
    """Return the name of the teacher's directory: a hash of its checkpoint's digests, or of its
    endpoint and model name."""
    spec: dict[str, Any] = {**teacher.describe()}
    if checkpoint:
        spec["model"] = dict(checkpoint)
    return address_of(spec)


def keep_teachers(config: Config, caches: Mapping[str, TeacherCache]) -> None:
    """Write the description, output head and tokenizer of each teacher into its cache, unless they
    are there and undamaged. Raises StorageError."""
    for name, cache in caches.items():
        teacher, description = config.teachers[name], cache.directory / "teacher.json"
        if _is_kept(cache, teacher):
            continue
        with disk_errors(description):
            cache.directory.mkdir(parents=True, exist_ok=True)
            with (cache.directory / "lock").open("w") as lock:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if _is_kept(cache, teacher):  # written by another run in the meantime
                    continue
                content: dict[str, Any] = {**teacher.describe()}
                if teacher.local:
                    with atomic_directory(Path(cache.teacher)) as partial:
                        export_head(teacher.model, teacher.precision, partial)
                    content["checkpoint"] = checkpoint_of(teacher, here=True)
                    content["copy"] = _digests(Path(cache.teacher))
                atomic_write(description, json.dumps(content, indent=2) + "\n")


def with_caches(
    workers: Workers,
    config: Config,
    stop_ids: tuple[int, ...],
    vocabulary: int,
    caches: Mapping[str, TeacherCache],
) -> Workers:
    """Return ``workers`` with a cache in front of each teacher, or in place of a teacher that is
    not loaded."""
    samplers, teachers = dict(workers.teacher_samplers), dict(workers.teachers)
    live = workers.live_teacher
    for name, cache in caches.items():
        teacher, sampler, scorer = config.teachers[name], samplers.get(name), teachers.get(name)
        settings = sampling_settings(teacher, config.rollout.max_tokens, stop_ids)
        samplers[name] = CachedSampler(sampler, cache, settings)
        form = score_form(teacher, vocabulary)
        teachers[name] = CachedTeacher(scorer, cache, form, name)
        live &= scorer is not None
    return replace(workers, teacher_samplers=samplers, teachers=teachers, live_teacher=live)


class CachedSampler:
    """Teacher completions: recorded ones first, in order, then new ones, which are stored."""

    def __init__(
        self, inner: Sampler | None, cache: TeacherCache, settings: Sequence[object]
    ) -> None:
        self.inner, self.cache, self.settings = inner, cache, settings
        self.taken: Counter[str] = Counter()
        self.reused = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        seed: Seed,
        temperature: float = 1.0,
        top_p: float = 1.0,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """See :class:`seqkd.protocols.Sampler`. ``finished`` is never called, because the order of
        recorded and new completions is only determined at the end. A repeated prompt continues
        after the completions it has already used; without a teacher, it wraps around to the
        first."""
        stored = self.cache.completions
        places = []
        missing: Counter[str] = Counter()
        by_address: dict[str, int] = {}
        for i, (prompt, number) in enumerate(zip(prompts, samples, strict=True)):
            address = self.address(prompt, temperature, top_p)
            first = self.taken[address]
            if self.inner is None and number:
                have = stored.count(address)
                if have < number:
                    raise _missing_error(self.cache, f"{number} completions of {prompt.text!r:.60}")
                first = first if first + number <= have else 0
            self.taken[address] = first + number
            places.append((prompt, address, first, first + number))
            lack = self.taken[address] - stored.count(address)
            missing[address] = max(missing[address], lack, 0)
            by_address[address] = i
        asked = {a: n for a, n in missing.items() if n}
        self.reused += sum(samples) - sum(asked.values())
        if asked:
            assert self.inner is not None
            if not isinstance(seed, int):  # other seeds than those of the recorded completions
                seed = [seed[by_address[a]] + stored.count(a) for a in asked]
            new = self.inner.sample(
                [prompts[by_address[a]] for a in asked],
                list(asked.values()),
                seed,
                temperature,
                top_p,
            )
            drawn = iter(new)
            stored.append(
                [_completion_row(a, next(drawn)) for a, n in asked.items() for _ in range(n)]
            )
        return [
            _as_rollout(prompt, row)
            for prompt, address, first, last in places
            for row in (stored.rows(address, first, last) if last > first else ())
        ]

    def position(self) -> dict[str, int]:
        """Return the number of completions used so far, by address."""
        return dict(self.taken)

    def restore(self, position: Mapping[str, int]) -> None:
        """Return to a position."""
        self.taken = Counter(position)

    def address(self, prompt: Prompt, temperature: float, top_p: float) -> str:
        """Return the address of the completions of ``prompt`` with these sampling settings."""
        return address_of([prompt.token_ids, self.settings, float(temperature), float(top_p)])

    def usage(self) -> dict[str, int]:
        """Return the requests to an endpoint so far, and the number of reused completions."""
        return {**(self.inner.usage() if self.inner else {}), "reused": self.reused}


class CachedTeacher:
    """Scores from the cache and new scores, which are stored except those of student samples.

    Scores are addressed by the scored tokens and by their form (:func:`score_form`).
    """

    def __init__(
        self, inner: Teacher | None, cache: TeacherCache, form: str, name: str = ""
    ) -> None:
        self.inner, self.cache, self.form, self.name = inner, cache, form, name
        self.reused = 0

    def missing(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts that have no stored score."""
        return [r for r in rollouts if self.address(r) not in self.cache.scores]

    def address(self, rollout: Rollout) -> str:
        """Return the address of a rollout's score."""
        return address_of([rollout.prompt_ids, rollout.completion_ids, self.form])

    def score(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherScore]:
        """See :class:`seqkd.protocols.Teacher`. Student samples are scored in a request of their
        own, so that their scores do not depend on the contents of the cache."""
        by_student = [r for r in rollouts if r.source == "student"]
        others = [r for r in rollouts if r.source != "student"]
        missing = {self.address(r): r for r in self.missing(others)}
        self.reused += len(others) - len(missing)
        new = self._new(list(missing.values()))
        self.cache.add_scores([(a, new[r.sample_id]) for a, r in missing.items()])
        return self._new(by_student) | {r.sample_id: self._read(r) for r in others}

    def usage(self) -> dict[str, int]:
        """Return the requests to an endpoint so far, and the number of scores read from the
        cache."""
        inner = self.inner.usage() if self.inner else {}
        return {**inner, "reused_scores": self.reused}

    def _new(self, rollouts: list[Rollout]) -> dict[str, TeacherScore]:
        if not rollouts:
            return {}
        if self.inner is None:
            raise _missing_error(self.cache, f"scores of {len(rollouts)} completions")
        return self.inner.score(rollouts)

    def _read(self, rollout: Rollout) -> TeacherScore:
        score = self.cache.read_score(self.address(rollout), rollout.sample_id)
        return replace(score, teacher=self.name)


def sampling_settings(
    teacher: SingleTeacherConfig, max_tokens: int, stop_ids: tuple[int, ...]
) -> list[object]:
    """Return the settings that a teacher completion depends on and that are part of its
    address."""
    return [max_tokens, stop_ids, teacher.writing_precision]


def score_form(teacher: SingleTeacherConfig, vocabulary: int) -> str:
    """Return the kind of score, which is part of its address."""
    if teacher.scores == "hidden":
        return teacher.scores
    top_k = f"{teacher.top_k} " if teacher.scores == "top_k" else ""
    return f"{teacher.scores} {top_k}of {vocabulary}"


def bytes_per_token(teacher: SingleTeacherConfig) -> int:
    """Return the size on disk of the score of one completion token."""
    if teacher.scores == "top_k":
        return 4 + 4 * teacher.top_k + 4 * (teacher.top_k + 1)
    if teacher.scores != "hidden":
        return 4
    hidden_size: int = load_config(teacher.model, "teacher.model").hidden_size
    return hidden_size * dtype_of(teacher.precision).itemsize


def _missing_error(cache: TeacherCache, what: str) -> TeacherCacheError:
    return TeacherCacheError(
        f"teacher_cache.path: {cache.directory} lacks {what}. Run seqkd precompute with "
        "the same configuration; existing entries are kept."
    )


def _completion_row(address: str, rollout: Rollout) -> dict[str, Any]:
    return {
        "address": address,
        "sample_id": rollout.sample_id,
        "prompt_ids": rollout.prompt_ids,
        "completion_ids": rollout.completion_ids,
        "logprobs": rollout.rollout_logprobs,
        "finish_reason": rollout.finish_reason,
    }


def _as_rollout(prompt: Prompt, row: dict[str, Any]) -> Rollout:
    logprobs = row["logprobs"].as_py()
    return Rollout(
        prompt_id=prompt.prompt_id,
        sample_id=row["sample_id"].as_py(),
        prompt_ids=prompt.token_ids,
        completion_ids=tuple(row["completion_ids"].as_py()),
        rollout_logprobs=None if logprobs is None else tuple(logprobs),
        source="teacher",
        policy_version=0,
        finish_reason=row["finish_reason"].as_py(),
        tag=prompt.tag,
    )


def address_of(value: Any) -> str:
    """Return the address of a request: a hash of ``value`` (plain data)."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
