"""Configuration -> running actors."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

from actors import placement, weight_sync
from actors.groups import LearnerGroup, RolloutGroup, TeacherGroup, wait
from seqkd.api_client import key_of
from seqkd.config import Config
from seqkd.config_roles import ApiTeacher, OneTeacher
from seqkd.errors import ActorError, ResourceError
from seqkd.models import expand
from seqkd.preflight import Checked
from seqkd.workers import Workers


@contextmanager
def connect(config: Config, verbose: bool) -> Iterator[None]:
    """Join the cluster that ``config`` or the job names, or start one on this machine."""
    import ray

    # A job's driver finds its cluster by itself; RAY_ADDRESS is set for it.
    address = config.cluster or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _reach(address)
        level = logging.INFO if verbose else logging.ERROR
        ray.init(address, log_to_driver=verbose, logging_level=level, **options)
    except Exception as error:  # Ray raises bare RuntimeError and ConnectionError here
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError unless something listens at host:port; Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _no_cluster(address: str, error: Exception) -> ResourceError:
    text = " ".join(str(error).split())
    if "token" in text.lower() or "auth" in type(error).__name__.lower():
        return ResourceError(
            f"cluster: {address!r} wants an authentication token and none was found. Set "
            "RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token or "
            f"RAY_AUTH_TOKEN. ({text})"
        )
    return ResourceError(
        f"cluster: no Ray cluster answers at {address!r}. Start one with `ray start --head`, "
        "name another address, or leave cluster out to run on this machine. If it is there and "
        f"wants an authentication token, set RAY_AUTH_MODE=token. ({text})"
    )


def check_resources(config: Config, roles: set[placement.Role] | None = None) -> None:
    """ResourceError where the cluster could never hold the plan."""
    import ray

    have = ray.cluster_resources()
    placement.plan(config, roles).check(have.get("CPU", 0), have.get("GPU", 0), "the cluster")


@contextmanager
def workers(
    config: Config,
    student_path: str,
    checked: Checked,
    roles: set[placement.Role] | None = None,
) -> Iterator[Workers]:
    """Start every actor of the plan, wait until each is ready, and free all of it at the end."""
    from ray.util.placement_group import placement_group, remove_placement_group

    plan = placement.plan(config, roles)
    group = placement_group(list(plan.bundles), strategy="PACK")
    try:
        if not group.wait(timeout_seconds=60):
            raise ResourceError(
                f"cluster: no node has {_largest(plan.bundles)} free. Wait for the other jobs, or "
                "set placement to split so that the roles may be on different nodes."
            )
        with _started(config, plan, group, student_path, checked) as crew:
            yield crew
    finally:
        remove_placement_group(group)


@contextmanager
def _started(
    config: Config,
    plan: placement.Plan,
    group: Any,
    student_path: str,
    checked: Checked,
) -> Iterator[Workers]:
    import ray

    from actors.learner import LearnerRank
    from actors.rollout import RolloutActor

    stop_ids, max_model_len = checked.stop_ids, checked.max_model_len

    def create(cls: type, role: placement.Role, teacher: str, *args: Any) -> list[Any]:
        remote: Any = ray.remote(cls)
        places = plan.role(role, teacher)
        return [remote.options(**place.options(group)).remote(*args) for place in places]

    run_id = uuid.uuid4().hex[:12]
    ranks = create(LearnerRank, "learner", "", config.learner, run_id)
    students = create(RolloutActor, "rollout", "", stop_ids, "student")
    scorers, writers, starts = _create_teachers(config, plan, checked, create)
    node = None
    if ranks:
        master, node = wait(ranks[0].rendezvous.remote(), "learner start")
        heads = {
            name: (expand(teacher.model), teacher.precision)
            for name, teacher in config.teachers.items()
            if teacher.scores == "hidden"
        }
        starts["learner"] = [
            r.start.remote(rank, master, student_path, heads) for rank, r in enumerate(ranks)
        ]
    starts["rollout"] = [
        a.start.remote(student_path, config.rollout, max_model_len) for a in students
    ]
    for role, refs in starts.items():
        wait(refs, f"{role} start")
    learner = LearnerGroup(ranks, config.learner.micro_batch_prompts, expand(config.student.model))
    length = config.rollout.max_tokens
    try:
        yield Workers(
            student=RolloutGroup(students, length, learner, "rollout"),
            learner=learner,
            teachers={name: TeacherGroup(of, name) for name, of in scorers.items() if of},
            teacher_samplers={
                name: RolloutGroup(of, length, None, "teacher_sampler")
                for name, of in writers.items()
                if of
            },
            teacher_of=config.teacher_of,
            distribution=config.teacher.distribution,
        )
    finally:
        everyone = (ranks, students, *scorers.values(), *writers.values())
        for actor in chain.from_iterable(everyone):
            ray.kill(actor)  # one that hangs or waits for a dead one would never close by itself
        if node is not None:
            _clean_shared_memory(run_id, node)


def _create_teachers(
    config: Config, plan: placement.Plan, checked: Checked, create: Callable[..., list[Any]]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, list[Any]]]:
    """By name, the actors that score and those that write; by role, their starts under way."""
    scorers: dict[str, list[Any]] = {}
    writers: dict[str, list[Any]] = {}
    starts: dict[str, list[Any]] = {"teacher": [], "teacher_sampler": []}
    for name, teacher in config.teachers.items():
        if not any(plan.role(role, name) for role in ("teacher", "teacher_sampler")):
            continue
        scoring, writing = _teacher_actors(config, teacher, checked)
        scorers[name] = create(scoring.cls, "teacher", name, *scoring.made_of)
        writers[name] = create(writing.cls, "teacher_sampler", name, *writing.made_of)
        starts["teacher"] += [a.start.remote(*scoring.started_with) for a in scorers[name]]
        starts["teacher_sampler"] += [a.start.remote(*writing.started_with) for a in writers[name]]
    return scorers, writers, starts


class _Actors(NamedTuple):
    cls: type
    made_of: tuple[Any, ...]
    started_with: tuple[Any, ...]


def _teacher_actors(
    config: Config, teacher: OneTeacher, checked: Checked
) -> tuple[_Actors, _Actors]:
    """Those that score and those that write."""
    from actors.api_teacher import ApiSampler, ApiScorer
    from actors.rollout import RolloutActor
    from actors.teacher import TeacherActor

    if isinstance(teacher, ApiTeacher):
        key = key_of(teacher)
        writing = (teacher, key, expand(config.student.model))
        return (
            _Actors(ApiScorer, (), (teacher, key, checked.vocabulary)),
            _Actors(ApiSampler, (checked.stop_ids,), writing),
        )
    engine = (expand(teacher.model), teacher.generation, checked.max_model_len)
    return (
        _Actors(TeacherActor, (), (teacher, checked.max_model_len, checked.vocabulary)),
        _Actors(RolloutActor, (checked.stop_ids, "teacher"), engine),
    )


def _clean_shared_memory(run_id: str, node: str) -> None:
    """Remove the published weights, by a task of its own where the learner was: its rank may have
    been killed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(weight_sync.remove)
    with suppress(ActorError):  # the node is gone, and its memory with it
        wait(task.options(num_cpus=0, scheduling_strategy=here).remote(run_id), "cleaning up")


def _largest(bundles: tuple[dict[str, float], ...]) -> str:
    bundle = max(bundles, key=lambda b: (b.get("GPU", 0), b["CPU"]))
    return " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
