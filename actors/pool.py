"""Calls on actors, watched: a death, a hang or an exception is noticed, its cause named, and the
actor replaced. The only place that waits for Ray."""

from __future__ import annotations

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
"""So long a process may take to come up before that is said."""
REAPING_S = 60.0
"""Longest wait for the nodes of a cluster to end their processes."""
HEALTH = "health"
"""Concurrency group of the heartbeat: a thread that answers while the actor is at work."""
READING = "reading"
"""That of reading what the actor has published, likewise."""


def remote(cls: type) -> Any:
    """``cls`` as a class of actors that can be watched."""
    import ray

    watched: Any = ray.remote
    return watched(concurrency_groups={HEALTH: 1, READING: 1})(cls)


@dataclass(frozen=True)
class Failure:
    """Why a call has no result."""

    cause: SeqkdError
    gone: bool
    """Whether the process is dead or does not answer; else it raised."""
    hung: bool = False
    """Whether it does not answer, so that it may be there still."""

    @property
    def for_the_user(self) -> bool:
        """Whether it was raised for the user to mend; then no new process helps."""
        return not self.gone and type(self.cause) is not ActorError


@dataclass(frozen=True)
class Arrived:
    """One of the results of a call that gives several, as they come."""

    value: Any


@dataclass
class _Call:
    actor: Any
    index: int
    begun: float
    beat: Any = None
    asked: float = 0.0
    came_up: bool = False
    said: bool = False


class Calls:
    """Calls under way. Their results come one by one, as they end."""

    def __init__(
        self,
        what: str,
        control: Control,
        check: Callable[[], None] | None = None,
        starting: bool = False,
    ) -> None:
        """``check`` raises where they are not to be waited for any longer. A process that is
        ``starting`` may wait for a place before it can answer at all."""
        self.what, self.control, self.check = what, control, check or control.check
        self.starting = starting
        self.under_way: dict[Any, _Call] = {}

    def add(self, index: int, actor: Any, ref: Any) -> None:
        """Watch ``ref``, a call on ``actor``."""
        self.under_way[ref] = _Call(actor, index, time.monotonic(), came_up=not self.starting)

    def next(self, timeout: float | None = None) -> tuple[int, Any] | None:
        """Index, and result or :class:`Failure`, of the next call that ends; None after
        ``timeout`` seconds. What the actor raises for the user comes as it is. Of a call that
        gives several results, each :class:`Arrived`, and None at its end."""
        import ray

        begun = time.monotonic()
        while timeout is None or time.monotonic() - begun < timeout:
            self.check()
            done, _ = ray.wait(list(self.under_way), timeout=TICK_S)
            if done:
                result = self._next(done[0])
                call = self.under_way[done[0]]
                if not isinstance(result, Arrived):
                    del self.under_way[done[0]]
                return call.index, result
            for ref, call in self.under_way.items():
                if silence := self._silence(call):
                    del self.under_way[ref]
                    cause = ActorError(f"{self.what}: process {call.index} {silence}.")
                    return call.index, Failure(cause, gone=True, hung=True)
        return None

    def _next(self, ref: Any) -> Any:
        """The result of a call that has one; of a generator's its next."""
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

    def _silence(self, call: _Call) -> str | None:
        """What is wrong with an actor that has not answered yet; None where it is at work."""
        import ray

        now, recovery = time.monotonic(), self.control.recovery
        if now - call.begun > recovery.stall_s:
            return f"has not ended within recovery.stall_s = {recovery.stall_s:g} s"
        if call.beat is None:
            call.beat, call.asked = is_alive(call.actor), now
        elif ray.wait([call.beat], timeout=0)[0]:
            call.came_up = True
            if now - call.asked > recovery.heartbeat_s / 4:
                call.beat = None
        elif call.came_up and now - call.asked > recovery.heartbeat_s:
            return f"has not answered for recovery.heartbeat_s = {recovery.heartbeat_s:g} s"
        elif not call.came_up and not call.said and now - call.begun > UNUSUAL_S:
            self.control.say(f"{self.what}: process {call.index} still waits for a place.")
            call.said = True
        return None


def is_alive(actor: Any) -> Any:
    """A reference that is there as soon as the actor's process answers, whatever it is doing."""
    return actor.__ray_call__.options(concurrency_group=HEALTH).remote(_nothing)


def kill_orphans(names: Sequence[str]) -> None:
    """End the processes of this job that were started under ``names``, on every node. Ray itself
    does not end one that hangs before it has come up once, and would keep its place for it. Those
    of another Ray on the same machine, whose jobs have the same numbers, have another raylet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    job = ray.get_runtime_context().get_job_id()

    def there() -> None:
        import psutil

        own = {"RAY_JOB_ID": job, "RAY_RAYLET_PID": os.environ["RAY_RAYLET_PID"]}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get(PROCESS) in names and own.items() <= environment.items():
                    process.kill()

    task: Any = ray.remote(num_cpus=0, max_retries=0)(there)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    ray.wait(refs, num_returns=len(refs), timeout=REAPING_S)


def _nothing(actor: Any) -> None:
    """Run in the actor: that it runs is the answer."""


def _why(error: Exception) -> str:
    """What Ray's long report says of the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "because" in line), lines[0])
    if "worker process has died" in reason:
        return "its process was killed (by a person, or by the system for its memory) or crashed."
    return reason.removeprefix("The actor is dead because ")


class Pool:
    """Processes that do the same, each replaced where it is lost."""

    def __init__(
        self,
        name: str,
        actors: Sequence[Any],
        control: Control | None = None,
        create: Callable[[int], Any] | None = None,
        starting: tuple[Any, ...] = (),
        paid: bool = False,
    ) -> None:
        """``create(i)`` makes a process in the place of process i, which ``start(*starting)`` makes
        ready; without it nothing is replaced. ``paid``: they ask an endpoint and count it."""
        self.name, self.actors, self.paid = name, list(actors), paid
        self.control, self.create, self.starting = control or Control(), create, starting
        self.on_replaced: Callable[[int], None] = lambda index: None
        """Brings a new process to where the others are, once it has started."""
        self.raise_root_cause: Callable[[], None] = lambda: None
        """Raises what else is lost, where that is the cause: then none of these is replaced."""

    def ask(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        what: str = "",
        arrived: Callable[[int, Any], None] = lambda index, value: None,
    ) -> Callable[[], list[Any]]:
        """Call ``method`` on every process that has arguments, and return at once; what is
        returned waits for the results, None where nothing was asked. See :meth:`stream`."""
        calls = Calls(f"{self.name} {what or method}", self.control, starting=method == "start")
        for index, call in enumerate(arguments):
            if call is not None:
                self._call(calls, index, method, call)
        return lambda: self._results(calls, method, arguments, arrived)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...] | None], what: str = ""
    ) -> list[Any]:
        """:meth:`ask` and wait."""
        return self.ask(method, arguments, what)()

    def stream(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        arrived: Callable[[int, Any], None],
        what: str = "",
    ) -> None:
        """Call a generator on every process that has arguments; ``arrived(i, value)`` is told what
        process i gives, at once. What a lost process had given comes again from the next one."""
        self.ask(method, arguments, what, arrived)()

    def each(self, method: str, *arguments: Any, what: str = "") -> list[Any]:
        """Call ``method`` with the same arguments on every process."""
        return self.call(method, [arguments] * len(self.actors), what)

    def kill(self) -> None:
        """End every process, also one that hangs."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _call(self, calls: Calls, index: int, method: str, arguments: tuple[Any, ...]) -> None:
        actor = self.actors[index]
        calls.add(index, actor, getattr(actor, method).remote(*arguments))

    def _results(
        self,
        calls: Calls,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        arrived: Callable[[int, Any], None],
    ) -> list[Any]:
        results: list[Any] = [None] * len(arguments)
        raised: dict[int, str] = {}
        while calls.under_way:
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
            if method != "start":  # else it has been started just now
                call = arguments[index]
                assert call is not None
                self._call(calls, index, method, call)
        return results

    def _replace(self, index: int, failure: Failure, raised: dict[int, str]) -> None:
        """A new process in the place of a lost one. What is the user's to mend, or is raised a
        second time by a fresh process, is raised here."""
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
            with suppress(Exception):  # it may be long gone
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
