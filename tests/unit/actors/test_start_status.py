"""Report of the roles that are ready while the actors start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actors import build


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(build, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_each_change_is_reported_once_with_its_time(clock):
    ready, lines = set[str](), []
    names = ("rollout", "teacher", "learner")
    roles = {name: SimpleNamespace(is_ready=lambda name=name: name in ready) for name in names}
    startup = build._Startup(roles, lines.append)
    for seconds, changed in ((1, ""), (4, "learner"), (2, ""), (3, "rollout"), (1, ""), (2, "")):
        clock.now += seconds
        ready ^= {changed} - {""}
        startup.update()
    assert lines == [
        "rollout loading, teacher loading, learner loading",
        "rollout loading, teacher loading, learner ready after 5 s",
        "rollout ready after 10 s, teacher loading, learner ready after 5 s",
    ]
    ready.remove("rollout")  # it was lost, and is started again
    startup.update()
    assert lines[-1] == "rollout loading, teacher loading, learner ready after 5 s"
    ready.update(names)
    startup.update()
    assert len(lines) == 4, "the command itself reports that all actors are ready"
