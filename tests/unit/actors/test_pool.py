"""The message about a process whose start takes long."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from actors.pool import UNUSUAL_S, Calls, _Call
from seqkd.training.control import Control


@pytest.mark.parametrize(
    ("up", "pid", "stage"),
    [
        (False, 0, "is still waiting for cores or GPUs that an earlier process"),
        (False, 7, "is still importing its libraries after 6"),
        (True, 7, "is still loading its model after 6"),
    ],
)
def test_a_slow_start_reports_its_stage_once(monkeypatch, up, pid, stage):
    monkeypatch.setattr("ray._private.state.actors", lambda actor: {"Pid": pid})
    monkeypatch.setattr("actors.pool.is_alive", lambda actor: None)
    said = []
    calls = Calls("rollout start", Control(say=said.append), starting=True)
    actor = SimpleNamespace(_actor_id=b"a")
    call = _Call(actor, 2, time.monotonic() - UNUSUAL_S - 1, came_up=up)
    assert calls._hang(call) is None and calls._hang(call) is None
    (line,) = said
    assert line.startswith(f"rollout start: process 2 {stage}")
    assert line.endswith("A start normally takes 20 to 120 s.")
