"""Supervised calls on actors.

Deaths, hangs and exceptions of actors are detected, reported with their cause, and the actor is
replaced. All waiting for Ray happens in this module.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actors.placement import PROCESS
from seqkd.errors import ActorError, SeqkdError
from seqkd.training.control import TICK_S, Control

UNUSUAL_S = 60.0
"""Startup time of a process after which a message reports what it waits for."""
REAPING_S = 60.0
"""Longest wait for the nodes of a cluster to end their processes."""
HEALTH = "health"
"""Concurrency group of the heartbeat. Its thread answers while the actor is busy."""
READING = "reading"
"""Concurrency group for reading published weights. Its thread answers while the actor is busy."""


def remote(cls: type) -> Any:
    """Return ``cls`` as a Ray actor class that can be supervised."""
    import ray

    watched: Any = ray.remote
    return watched(concurrency_groups={HEALTH: 1, READING: 1})(cls)


@dataclass(frozen=True)
class Failure:
    """Reason why a call has no result."""

    cause: SeqkdError
    gone: bool
    """True if the process is dead or does not answer, False if it raised an error."""
    hung: bool = False
    """True if the process does not answer but may still exist."""

    @property
    def for_the_user(self) -> bool:
        """True if the user must fix the cause, so that a new process does not help."""
        return not self.gone and type(self.cause) is not ActorError


@dataclass(frozen=True)
class Arrived:
    """Single result of a call that yields several results."""

    value: Any


@dataclass
class _Call:
    actor: Any
    index: int
    begun: float
    beat: Any = None
    asked: float = 0.0
    came_up: bool = False
    reported: bool = False


class Calls:
    """Pending calls, whose results are returned one by one in the order of arrival."""

    def __init__(
        self,
        what: str,
        control: Control,
        check: Callable[[], None] | None = None,
        starting: bool = False,
        stall_s: float | None = None,
    ) -> None:
        """Create an empty set of calls. ``check`` raises if waiting must end. Processes that are
        ``starting`` may wait for resources before they can answer. A call may take ``stall_s``
        seconds, by default ``recovery.stall_s``."""
        self.what, self.control, self.check = what, control, check or control.check
        self.starting, self.stall_s = starting, stall_s or control.recovery.stall_s
        self.pending: dict[Any, _Call] = {}

    def add(self, index: int, actor: Any, ref: Any) -> None:
        """Supervise ``ref``, a call on ``actor``."""
        self.pending[ref] = _Call(actor, index, time.monotonic(), came_up=not self.starting)

    def next(self, timeout: float | None = None) -> tuple[int, Any] | None:
        """Return the index and the result or :class:`Failure` of the next call that ends, or None
        after ``timeout`` seconds. The cause of a failure that the user must fix is the actor's own
        exception. A call that yields several results returns each as :class:`Arrived`, and a result
        of None at its end."""
        import ray

        begun = time.monotonic()
        while timeout is None or time.monotonic() - begun < timeout:
            self.check()
            done, _ = ray.wait(list(self.pending), timeout=TICK_S)
            if done:
                result = self._next(done[0])
                call = self.pending[done[0]]
                if not isinstance(result, Arrived):
                    del self.pending[done[0]]
                return call.index, result
            for ref, call in self.pending.items():
                if problem := self._hang(call):
                    del self.pending[ref]
                    cause = ActorError(f"{self.what}: process {call.index} {problem}.")
                    return call.index, Failure(cause, gone=True, hung=True)
        return None

    def _next(self, ref: Any) -> Any:
        """Return the result of a call, or the next result of a generator."""
        from ray import ObjectRefGenerator

        if not isinstance(ref, ObjectRefGenerator):
            return self._result(ref)
        try:
            result = self._result(next(ref))
        except StopIteration:
            return None
        return result if isinstance(result, Failure) else Arrived(result)

    def _result(self, ref: Any) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, SeqkdError):
                return Failure(cause, gone=False)
            text = next((line for line in str(cause).splitlines() if line.strip()), "")
            message = f"{self.what} failed: {type(cause).__name__}: {text}"
            return Failure(ActorError(message, details=str(error)), gone=False)
        except RayError as error:
            return Failure(ActorError(f"{self.what} died: {_why(error)}"), gone=True)

    def _hang(self, call: _Call) -> str | None:
        """Return a description of the hang of an actor, or None if it is still running."""
        import ray

        now, recovery = time.monotonic(), self.control.recovery
        if now - call.begun > self.stall_s:
            return f"has not finished within recovery.stall_s = {self.stall_s:g} s"
        if self.starting and not call.reported and now - call.begun > UNUSUAL_S:
            call.reported = True
            self.control.say(
                f"{self.what}: process {call.index} {_stage(call)} after {now - call.begun:.0f} s. "
                "A start normally takes 20 to 120 s."
            )
        if call.beat is None:
            call.beat, call.asked = is_alive(call.actor), now
        elif ray.wait([call.beat], timeout=0)[0]:
            call.came_up = True
            if now - call.asked > recovery.heartbeat_s / 4:
                call.beat = None
        elif call.came_up and now - call.asked > recovery.heartbeat_s:
            return f"has not answered for recovery.heartbeat_s = {recovery.heartbeat_s:g} s"
        return None


def is_alive(actor: Any) -> Any:
    """Return a reference that is ready as soon as the actor's process answers, even if it is
    busy."""
    return actor.__ray_call__.options(concurrency_group=HEALTH).remote(_nothing)


def _stage(call: _Call) -> str:
    """Describe what a starting process waits for."""
    from ray._private.state import actors  # ray.util.state requires the dashboard

    if call.came_up:
        return "is still loading its model"
    if actors(call.actor._actor_id.hex()).get("Pid"):
        return "is still importing its libraries"
    # The run's placement group is reserved before its processes are created.
    return "is still waiting for cores or GPUs that an earlier process of this run has not released"


def have_succeeded(refs: list[Any]) -> bool:
    """Return True if all calls have ended without an error."""
    import ray

    if len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) < len(refs):
        return False
    try:
        ray.get(refs)
    except ray.exceptions.RayError:
        return False
    return True


def kill_orphans(names: Sequence[str]) -> None:
    """End the processes of this job that were started under ``names``, on all nodes.

    Ray does not end a process that hangs during startup, and keeps its resources reserved.
    Processes of another Ray on the same machine may have the same job id, so the raylet is compared
    too.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    job = ray.get_runtime_context().get_job_id()

    def kill_on_node() -> None:
        import psutil

        own = {"RAY_JOB_ID": job, "RAY_RAYLET_PID": os.environ["RAY_RAYLET_PID"]}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get(PROCESS) in names and own.items() <= environment.items():
                    process.kill()

    task: Any = ray.remote(num_cpus=0, max_retries=0)(kill_on_node)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    ray.wait(refs, num_returns=len(refs), timeout=REAPING_S)


def _nothing(actor: Any) -> None:
    """Do nothing in the actor. Returning at all proves that the actor is alive."""


def _why(error: Exception) -> str:
    """Return the cause from Ray's long report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "because" in line), lines[0])
    if "worker process has died" in reason:
        return "its process crashed or was killed (by a user, or by the system if out of memory)."
    return reason.removeprefix("The actor is dead because ")


class Pool:
    """Interchangeable processes that are replaced when lost."""

    def __init__(
        self,
        name: str,
        actors: Sequence[Any],
        control: Control | None = None,
        create: Callable[[int], Any] | None = None,
        starting: tuple[Any, ...] = (),
        paid: bool = False,
    ) -> None:
        """Create the pool. ``create(i)`` returns a replacement of process i, whose
        ``start(*starting)`` makes it ready. If unset, processes are not replaced. ``paid`` means
        that the processes call an endpoint and count its usage."""
        self.name, self.actors, self.paid = name, list(actors), paid
        self.control, self.create, self.starting = control or Control(), create, starting
        self.starts: dict[int, Any] = {}
        """Last call of ``start`` by process."""
        self.on_replaced: Callable[[int], None] = lambda index: None
        """Called with the index of a replacement after its start, to bring it up to date."""
        self.raise_root_cause: Callable[[], None] = lambda: None
        """Raises if the loss of another component is the root cause, so that no process of this
        pool is replaced."""

    def ask(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        what: str = "",
        arrived: Callable[[int, Any], None] = lambda index, value: None,
    ) -> Callable[[], list[Any]]:
        """Call ``method`` on every process that has arguments, without waiting. Returns a function
        that waits and returns the results, with None for processes without arguments. For
        ``arrived`` see :meth:`stream`."""
        starting = method == "start"
        # Requests to an endpoint have their own time limits. A slow endpoint is not a hung process.
        stall_s = math.inf if self.paid and not starting else None
        calls = Calls(
            f"{self.name} {what or method}", self.control, starting=starting, stall_s=stall_s
        )
        for index, call in enumerate(arguments):
            if call is not None:
                self._call(calls, index, method, call)
        return lambda: self._results(calls, method, arguments, arrived)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...] | None], what: str = ""
    ) -> list[Any]:
        """Call :meth:`ask` and wait for the results."""
        return self.ask(method, arguments, what)()

    def stream(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        arrived: Callable[[int, Any], None],
        what: str = "",
    ) -> None:
        """Call a generator on every process that has arguments. ``arrived(i, value)`` is called
        with each value of process i as soon as it arrives. If a process is lost, its replacement
        yields its values again."""
        self.ask(method, arguments, what, arrived)()

    def each(self, method: str, *arguments: Any, what: str = "") -> list[Any]:
        """Call ``method`` with the same arguments on every process."""
        return self.call(method, [arguments] * len(self.actors), what)

    def is_ready(self) -> bool:
        """Return True if all processes have started."""
        return len(self.starts) == len(self.actors) and have_succeeded([*self.starts.values()])

    def kill(self) -> None:
        """End all processes, including hung ones."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _call(self, calls: Calls, index: int, method: str, arguments: tuple[Any, ...]) -> None:
        actor = self.actors[index]
        ref = getattr(actor, method).remote(*arguments)
        if method == "start":
            self.starts[index] = ref
        calls.add(index, actor, ref)

    def _results(
        self,
        calls: Calls,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        arrived: Callable[[int, Any], None],
    ) -> list[Any]:
        results: list[Any] = [None] * len(arguments)
        raised: dict[int, str] = {}
        while calls.pending:
            ended = calls.next()
            assert ended is not None
            index, result = ended
            if isinstance(result, Arrived):
                arrived(index, result.value)
                continue
            if not isinstance(result, Failure):
                results[index] = result
                continue
            self._replace(index, result, raised)
            if method != "start":  # _replace has already started it
                call = arguments[index]
                assert call is not None
                self._call(calls, index, method, call)
        return results

    def _replace(self, index: int, failure: Failure, raised: dict[int, str]) -> None:
        """Replace a lost process. Raises the cause if the user must fix it, or if a new process
        fails with the same error again."""
        import ray

        while True:
            self.raise_root_cause()
            cause = failure.cause
            again = not failure.gone and raised.get(index) == str(cause)
            if self.create is None or failure.for_the_user or again:
                raise cause
            if not failure.gone:
                raised[index] = str(cause)
            self.control.restart(f"{self.name} {index}", cause)
            with suppress(Exception):  # the actor may already be dead
                ray.kill(self.actors[index])
            if failure.hung:
                kill_orphans([f"{self.name} {index}"])
            self.actors[index] = self.create(index)
            calls = Calls(f"{self.name} start", self.control, starting=True)
            self._call(calls, index, "start", self.starting)
            ended = calls.next()
            assert ended is not None
            if not isinstance(ended[1], Failure):
                self.on_replaced(index)
                return
            failure = ended[1]
