"""Start of the actors that a configuration requires."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.request import ProxyHandler, build_opener

import psutil

from actors import placement
from actors.gcs_watch import JOINED_S, OWN_S, GcsWatch
from actors.groups import LearnerGroup, RolloutGroup, TeacherGroup
from actors.pool import Pool, remote
from seqkd.checks.preflight import Checked
from seqkd.config.rollout import RolloutConfig
from seqkd.config.run import Config
from seqkd.config.student import StudentConfig
from seqkd.config.teacher import EndpointTeacherConfig, LocalTeacherConfig, TeacherConfig
from seqkd.console import print_message
from seqkd.errors import ClusterLost, LearnerLost, ResourceError
from seqkd.models.loading import expand
from seqkd.teachers.endpoint import key_of
from seqkd.training.control import Control
from seqkd.workers import Workers


@contextmanager
def connect(config: Config, verbose: bool) -> Iterator[None]:
    """Connect to the cluster of ``config`` or of the Ray job, or start one on this machine."""
    import ray

    address = _address(config)
    # Ray would start one idle worker per core. Actors with their own environment do not use them.
    idle = {"_system_config": {"prestart_worker_first_driver": False}}
    options: dict[str, Any] = {"include_dashboard": False} | idle if address == "local" else {}
    reach(config)
    try:
        level = logging.INFO if verbose else logging.ERROR
        before = signal.getsignal(signal.SIGTERM)
        context = ray.init(address, log_to_driver=verbose, logging_level=level, **options)
        signal.signal(signal.SIGTERM, before)  # Ray's own handler would end with its exit code
    except Exception as error:  # Ray raises bare RuntimeError and ConnectionError here
        raise _no_cluster(config, str(error)) from error
    own = [] if address != "local" else psutil.Process().children(recursive=True)
    try:
        if address != "local" and context.dashboard_url and is_open(context.dashboard_url):
            print_message(
                "warning",
                f"cluster: {address!r} accepts requests without a token, so anyone who reaches its "
                "ports can run code as this user. Restart its head with RAY_AUTH_MODE=token (see "
                "docs/clusters.md).",
            )
        yield
    finally:
        ray.shutdown()
        for process in own:  # agents outlive the loss of their cluster
            with suppress(psutil.Error):
                process.kill()


def is_open(dashboard: str) -> bool:
    """Return True if the job API at host:port answers a request without a token."""
    direct = build_opener(ProxyHandler({}))
    try:
        with direct.open(f"http://{dashboard}/api/jobs/", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # refused, or not reachable from here
        return False


def _address(config: Config) -> str:
    # Ray sets RAY_ADDRESS for the driver of a job.
    return config.cluster or os.environ.get("RAY_ADDRESS") or "local"


def reach(config: Config) -> None:
    """Raise ResourceError unless a Ray head answers at host:port and accepts this process's token.
    Ray itself would retry for up to several minutes, and not report a refusal."""
    address = _address(config).removeprefix("ray://")
    if ":" not in address:
        return
    from grpc import RpcError, StatusCode
    from ray._private.grpc_utils import init_grpc_channel  # with the token and TLS, as Ray connects
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=10)
    except AuthenticationError as error:  # RAY_AUTH_MODE=token without a token
        raise _no_cluster(config, str(error)) from None
    except RpcError as error:
        if error.code() != StatusCode.UNIMPLEMENTED:  # Ray Client's server has other methods
            refused = error.code() == StatusCode.UNAUTHENTICATED
            raise _no_cluster(config, error.details() or error.code().name, refused) from None


def _no_cluster(config: Config, reason: str, refused: bool = False) -> ResourceError:
    field, address = "cluster" if config.cluster else "RAY_ADDRESS", _address(config)
    reason = " ".join(reason.split())
    if refused or "token" in reason.lower():
        mode = os.environ.get("RAY_AUTH_MODE")
        sent = "sent a wrong one" if mode == "token" and refused else "sends none"
        return ResourceError(
            f"{field}: the Ray head at {address!r} requires an authentication token, and this "
            f"process {sent} (RAY_AUTH_MODE is {mode or 'not set'}). Set RAY_AUTH_MODE=token, and "
            "store the head's token in ~/.ray/auth_token or RAY_AUTH_TOKEN."
        )
    return ResourceError(
        f"{field}: no Ray cluster answers at {address!r}: {reason:.300}. Start one with "
        f"`RAY_AUTH_MODE=token ray start --head`, set {field} to host:port of its head (port 6379 "
        f"by default, not the dashboard's 8265), or unset {field} to run on this machine."
    )


def check_resources(config: Config, roles: set[placement.Role] | None = None) -> None:
    """Raise ResourceError if the cluster has fewer resources than the run needs."""
    import ray

    have = ray.cluster_resources()
    placement.plan(config, roles).check(have.get("CPU", 0), have.get("GPU", 0), "the cluster")


@contextmanager
def workers(
    config: Config,
    student_path: str,
    checked: Checked,
    roles: set[placement.Role] | None,
    control: Control,
    status: Callable[[str], None] = lambda text: None,
) -> Iterator[Workers]:
    """Start the actors of ``roles`` (if None, of all roles that ``config`` needs), wait until all
    are ready, and free their resources at the end. ``status`` is called with the state of the
    start whenever a role becomes ready."""
    from ray.util.placement_group import placement_group, remove_placement_group

    plan = placement.plan(config, roles)
    group = placement_group(list(plan.bundles), strategy="PACK")
    try:
        if not group.wait(timeout_seconds=5):
            wanted = " and ".join(map(_listed, plan.bundles))
            control.say(f"waiting up to 60 s for {wanted} ({_free()} are free in the cluster)")
            if not group.wait(timeout_seconds=55):
                raise ResourceError(
                    f"cluster: no node has {_largest(plan.bundles)} free ({_free()} are free in "
                    "the cluster). Wait for other jobs to end, or set placement to split to allow "
                    "different nodes for the roles."
                )
        with _started(config, plan, group, student_path, checked, control, status) as crew:
            yield crew
    except ClusterLost:
        raise  # a request to the lost cluster would wait until Ray ends this process
    except BaseException:
        remove_placement_group(group)
        raise
    else:
        remove_placement_group(group)


@contextmanager
def _started(
    config: Config,
    plan: placement.Plan,
    group: Any,
    student_path: str,
    checked: Checked,
    control: Control,
    status: Callable[[str], None],
) -> Iterator[Workers]:
    def pool(role: placement.Role, teacher: str, actors: _Actors) -> Pool:
        """Return the pool of a role's processes."""
        cls, places = remote(actors.cls), plan.role(role, teacher)

        def create(index: int) -> Any:
            return cls.options(**places[index].options(group)).remote(*actors.init_args)

        processes = [create(index) for index in range(len(places))]
        name = f"{role} {teacher}".strip()
        return Pool(name, processes, control, create, actors.start_args, actors.paid)

    student = pool("rollout", "", _student_engine(config.rollout, student_path, checked))
    scorers, writers = {}, {}
    for name, teacher in config.teachers.items():
        if any(plan.role(role, name) for role in ("teacher", "teacher_sampler")):
            scoring, writing = TEACHER_ACTORS[teacher.kind](teacher, config.student, checked)
            scorers[name] = pool("teacher", name, scoring)
            writers[name] = pool("teacher_sampler", name, writing)
    pools = [student, *scorers.values(), *writers.values()]
    learner = _learner(config, plan, group, student_path, checked.stop_ids, control)
    watch = _gcs_watch(config)
    roles = {p.name: p for p in pools if p.actors} | ({"learner": learner} if learner else {})
    try:
        startup = _Startup(roles, status)

        def tick() -> None:
            watch()
            startup.update()

        control.tick = tick
        starting = [p.ask("start", [p.starting] * len(p.actors)) for p in pools]
        if learner:
            with suppress(LearnerLost):  # ready() starts it again
                learner.begin()
        for started in starting:
            started()
        if learner:
            learner.ready()
        control.tick = watch
        yield _assemble_workers(config.rollout, config.teacher, learner, student, scorers, writers)
    finally:
        control.tick = lambda: None
        for p in pools:
            p.kill()
        if learner:
            learner.kill()


def _gcs_watch(config: Config) -> GcsWatch:
    import ray

    joined = config.cluster or os.environ.get("RAY_ADDRESS")
    address = ray.get_runtime_context().gcs_address
    return GcsWatch(address, JOINED_S if joined else OWN_S)


class _Startup:
    """State of a start: the roles that are ready."""

    def __init__(
        self, roles: Mapping[str, Pool | LearnerGroup], status: Callable[[str], None]
    ) -> None:
        self.roles, self.status, self.begun = roles, status, time.monotonic()
        self.seconds: dict[str, float] = {}
        """Time from the start of the actors until a role was ready."""
        self._report()

    def update(self) -> None:
        """Report a change, except the last one."""
        ready = {name for name, role in self.roles.items() if role.is_ready()}
        if ready == self.seconds.keys():
            return
        now = time.monotonic() - self.begun
        self.seconds = {name: self.seconds.get(name, now) for name in ready}
        if ready != self.roles.keys():
            self._report()

    def _report(self) -> None:
        states = {n: f"ready after {seconds:.0f} s" for n, seconds in self.seconds.items()}
        self.status(", ".join(f"{name} {states.get(name, 'loading')}" for name in self.roles))


def _assemble_workers(
    rollout: RolloutConfig,
    teacher: TeacherConfig,
    learner: Any,
    student: Pool,
    scorers: Mapping[str, Pool],
    writers: Mapping[str, Pool],
) -> Workers:
    length = rollout.max_tokens
    return Workers(
        student=RolloutGroup(student, length, learner),
        learner=learner,
        teachers={n: TeacherGroup(pool, n) for n, pool in scorers.items() if pool.actors},
        teacher_samplers={
            name: RolloutGroup(pool, length) for name, pool in writers.items() if pool.actors
        },
        teacher_of=teacher.choose,
        distribution=teacher.distribution,
    )


def _learner(
    config: Config,
    plan: placement.Plan,
    group: Any,
    student_path: str,
    ends: tuple[int, ...],
    control: Control,
) -> LearnerGroup | None:
    """Return the group of ranks without starting it, or None if the plan has no ranks."""
    from actors.learner import LearnerRank

    cls, places = remote(LearnerRank), plan.role("learner")
    heads = {
        name: (expand(teacher.model), teacher.precision)
        for name, teacher in config.teachers.items()
        if teacher.scores == "hidden"
    }

    init_args = (config.learner, config.student.lora, config.seed, ends)

    def create() -> list[Any]:
        return [cls.options(**place.options(group)).remote(*init_args) for place in places]

    micro_batch, tokenizer_from = config.learner.micro_batch_tokens, expand(config.student.model)
    starting = (student_path, heads)
    return LearnerGroup(create, starting, micro_batch, tokenizer_from, control) if places else None


class _Actors(NamedTuple):
    cls: type
    init_args: tuple[Any, ...]
    start_args: tuple[Any, ...]
    paid: bool = False


def _student_engine(rollout: RolloutConfig, student_path: str, checked: Checked) -> _Actors:
    from actors.rollout import RolloutActor

    start_args = (student_path, rollout, checked.max_model_len)
    return _Actors(RolloutActor, (checked.stop_ids, "student"), start_args)


def _local_teacher(
    teacher: LocalTeacherConfig, student: StudentConfig, checked: Checked
) -> tuple[_Actors, _Actors]:
    from actors.rollout import RolloutActor
    from actors.teacher import TeacherActor

    engine = (expand(teacher.model), teacher.generation, checked.max_model_len)
    return (
        _Actors(TeacherActor, (), (teacher, checked.max_model_len, checked.vocabulary)),
        _Actors(RolloutActor, (checked.stop_ids, "teacher"), engine),
    )


def _endpoint_teacher(
    teacher: EndpointTeacherConfig, student: StudentConfig, checked: Checked
) -> tuple[_Actors, _Actors]:
    from actors.endpoint_teacher import ApiSampler, ApiScorer

    key = key_of(teacher)
    writing = (teacher, key, expand(student.model))
    return (
        _Actors(ApiScorer, (), (teacher, key, checked.vocabulary), paid=True),
        _Actors(ApiSampler, (checked.stop_ids, checked.content_tokens), writing, paid=True),
    )


TEACHER_ACTORS: dict[str, Callable[[Any, StudentConfig, Checked], tuple[_Actors, _Actors]]] = {
    "vllm": _local_teacher,
    "hf": _local_teacher,
    "openai": _endpoint_teacher,
}
"""Functions by teacher kind that return the scoring and the sampling actors."""


def _free() -> str:
    import ray

    free = ray.available_resources()
    return _listed({name: free.get(name, 0.0) for name in ("CPU", "GPU")})


def _largest(bundles: tuple[dict[str, float], ...]) -> str:
    bundle = max(bundles, key=lambda b: (b.get("GPU", 0), b["CPU"]))
    return _listed(bundle)


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in resources.items())
