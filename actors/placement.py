"""Resource requests: number of processes, and the cores, GPUs and threads of each process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from seqkd.config.resources import ActorsConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.errors import ResourceError

Role = Literal["learner", "rollout", "teacher", "teacher_sampler"]
PROCESS = "SEQKD_PROCESS"
"""Environment variable that contains the process's name: role, teacher, index."""

KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
"""glibc settings for processes that compute on CPU cores: up to 256 MiB of freed memory are kept.
By default, temporaries of a few MiB are returned to the kernel, which must clear the pages of the
next ones."""

NO_AOT = {"VLLM_USE_AOT_COMPILE": "0"}
"""vLLM setting for CPU cores. vLLM 0.32 cannot load its own ahead-of-time compiled code again, so
each start would compile again. Without ahead-of-time compilation it finds torch's cache."""

KEYS: dict[Role, tuple[str, str]] = {
    "learner": ("learner", "ranks"),
    "rollout": ("rollout", "actors"),
    "teacher": ("teacher", "actors"),
    "teacher_sampler": ("teacher.generation", "actors"),
}


@dataclass(frozen=True)
class ActorPlan:
    """Resources of one process of a role."""

    role: Role
    index: int
    threads: int
    gpus: float
    share: float
    """CPU cores requested from Ray. Less than ``threads`` if roles run alternately."""
    bundle: int
    """Index of the placement-group bundle of the process."""
    teacher: str = ""
    """Name of the teacher, if there are several teachers."""

    def options(self, group: Any) -> dict[str, Any]:
        """Return Ray actor options. The number of threads follows from the resource request."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.share,
            "num_gpus": self.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=self.bundle
            ),
            "runtime_env": {"env_vars": self.environment()},
        }

    def environment(self) -> dict[str, str]:
        """Return environment variables that must be set before the process imports torch."""
        threads = str(self.threads)
        return {
            PROCESS: f"{self.role} {self.teacher}".strip() + f" {self.index}",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM's engine core runs inside the actor, not in a separate process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DS_ACCELERATOR": "cuda" if self.gpus else "cpu",
            **({} if self.gpus else KEEP_FREED | NO_AOT),
        }


@dataclass(frozen=True)
class Plan:
    """Processes of a run and their placement-group bundles."""

    actors: tuple[ActorPlan, ...]
    bundles: tuple[dict[str, float], ...] = field(default_factory=tuple)

    def role(self, role: Role, teacher: str | None = None) -> tuple[ActorPlan, ...]:
        """Return the processes of a role in order, for one teacher or, if None, for all."""
        return tuple(a for a in self.actors if a.role == role and teacher in (None, a.teacher))

    def needs(self, resource: str) -> float:
        """Return the total of "CPU" or "GPU" over the bundles."""
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def check(self, cpus: float, gpus: float, where: str) -> None:
        """Raise ResourceError unless ``cpus`` and ``gpus`` are enough for the plan."""
        for resource, have, noun, key in (
            ("CPU", cpus, "CPU cores", "cpus"),
            ("GPU", gpus, "GPUs", "gpus"),
        ):
            need = self.needs(resource)
            if need > have:
                raise ResourceError(
                    f"the run needs {need:g} {noun}, but {where} has {have:g}. Lower "
                    + " or ".join(self._largest(key))
                    + (
                        ", or set placement to colocated."
                        if resource == "CPU" and len(self.bundles) > 1
                        else "."
                    )
                )

    def _largest(self, key: str) -> list[str]:
        """Return the configuration keys of the roles that need the most."""
        totals = {
            role: sum(a.threads if key == "cpus" else a.gpus for a in self.role(role))
            for role in KEYS
        }
        most = max(totals.values())
        return [
            f"{section}.{key} or {section}.{count} (now {most:g} in total)"
            for role, (section, count) in KEYS.items()
            if totals[role] == most
        ]


def needed(config: Config) -> set[Role]:
    """Return the roles that the phases and the held-out evaluation use."""
    terms = [term for _, phase in config.phases for term in phase.terms]
    samplers = [SAMPLERS[name] for name in config.samplers]
    measured = config.evaluation.prompts > 0
    asked = measured and not config.two_step  # otherwise the teacher cache has its answers
    roles: set[Role] = {"learner"}
    if measured or any(sampler.on_student for sampler in samplers):
        roles.add("rollout")
    if asked or any(sampler.on_teacher for sampler in samplers):
        roles.add("teacher_sampler")
    if (
        (asked and config.teacher.distribution)
        or any(sampler.weighted for sampler in samplers)
        or any(
            t.objective.teacher_need != "nothing" for t in terms if not SAMPLERS[t.sampler].recorded
        )
    ):
        roles.add("teacher")
    return roles


def recording(config: Config) -> set[Role]:
    """Return the roles that fill the cache for sampler=teacher_cache."""
    terms = [t for _, phase in config.phases for t in phase.terms if SAMPLERS[t.sampler].recorded]
    measured = config.evaluation.prompts > 0 and config.two_step
    roles: set[Role] = set()
    if measured or any(SAMPLERS[config.source(t.sampler)].on_teacher for t in terms):
        roles.add("teacher_sampler")
    if (measured and config.teacher.distribution) or any(
        term.objective.teacher_need != "nothing" for term in terms
    ):
        roles.add("teacher")
    return roles


Spec = tuple[Role, str, ActorsConfig]
"""Role, teacher name, and process configuration."""


def plan(config: Config, roles: set[Role] | None = None) -> Plan:
    """Return the processes and bundles of ``roles``, or if None of the roles that ``config``
    needs."""
    chosen = needed(config) if roles is None else roles
    learner = ActorsConfig(
        actors=config.learner.ranks, cpus=config.learner.cpus, gpus=config.learner.gpus
    )
    specs: list[Spec] = [("learner", "", learner), ("rollout", "", config.rollout)]
    for name, teacher in config.teachers.items():
        specs += [("teacher_sampler", name, teacher.writing), ("teacher", name, teacher.scoring)]
    specs = [spec for spec in specs if spec[0] in chosen]
    return _split(specs) if config.placement == "split" else _colocated(specs)


def _split(specs: list[Spec]) -> Plan:
    """Return a plan in which each process has its own cores."""
    actors = [
        ActorPlan(role, index, spec.cpus, spec.gpus, spec.cpus, bundle, name)
        for bundle, (role, name, spec, index) in enumerate(_processes(specs))
    ]
    return Plan(tuple(actors), tuple(_bundle(a.threads, a.gpus) for a in actors))


def _colocated(specs: list[Spec]) -> Plan:
    """Return a plan with one bundle, as large as the role that needs the most cores. Stages run one
    after the other, so each role can use all its threads while the others wait. GPUs are shared
    only if roles request fractions of them."""
    processes = _processes(specs)
    totals: Counter[Role] = Counter()
    for role, _, spec, _ in processes:
        totals[role] += spec.cpus
    cores = max(totals.values())
    # Ray keeps four decimals. Round down, so that the shares fit into the bundle.
    share = int(cores / len(processes) * 1000) / 1000
    actors = tuple(
        ActorPlan(role, index, spec.cpus, spec.gpus, share, 0, name)
        for role, name, spec, index in processes
    )
    return Plan(actors, (_bundle(cores, sum(actor.gpus for actor in actors)),))


def _processes(specs: list[Spec]) -> list[tuple[Role, str, ActorsConfig, int]]:
    return [(role, name, spec, i) for role, name, spec in specs for i in range(spec.actors)]


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
