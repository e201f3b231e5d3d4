"""Python processes that are forked from one process, which has imported torch, vLLM and DeepSpeed.

Importing vLLM takes 8 to 12 core-seconds, and a run with tiny models starts three processes that
import it. The tests run Ray's workers and the ``seqkd`` commands through this file instead of the
Python executable:

    python -S -E tests/fork_server.py SOCKET python SCRIPT|-m MODULE [ARGUMENT...]

This client passes its arguments, environment, working directory and open files to the server and
ends with the exit code of the forked process. It forwards signals to it. If the client is killed,
the server kills the forked process.

Ray is not imported before the fork: its C++ core reads environment variables while it is loaded.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

ADDRESS = "SEQKD_TEST_FORK_SERVER"
"""Environment variable with the path of the server's socket, for the tests."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable from which Ray reads the runtime environment of a driver's job."""

STARTING_S = 300
"""Seconds that a client waits for the server's imports."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def python() -> list[str]:
    """Return the command to use as the Python executable: the client if there is a server."""
    address = os.environ.get(ADDRESS)
    return (
        [sys.executable, "-S", "-E", __file__, address, "python"] if address else [sys.executable]
    )


def client(address: str, arguments: list[str]) -> int:
    """Let the server fork a process, and wait for its end. Return its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        _connect(link, address)
        request = json.dumps(
            {
                "arguments": arguments,
                "environment": dict(os.environ),
                "folder": os.getcwd(),
                "niceness": os.nice(0),
            }
        ).encode()
        socket.send_fds(link, [len(request).to_bytes(8, "big")], [0, 1, 2])
        link.sendall(request)
        child = int.from_bytes(_receive(link, 8), "big")
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = int.from_bytes(_receive(link, 8), "big")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


def _connect(link: socket.socket, address: str) -> None:
    """Connect as soon as the server has imported all it needs."""
    end = time.monotonic() + STARTING_S
    while True:
        try:
            return link.connect(address)
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def start(session: int) -> None:
    """Start the server of ``session``, the PID of the tests' first process, once."""
    address = os.environ[ADDRESS]
    with contextlib.suppress(FileExistsError):
        os.close(os.open(address + ".lock", os.O_CREAT | os.O_EXCL))
        subprocess.Popen(
            [sys.executable, __file__, address, "serve", str(session)],
            stdin=subprocess.DEVNULL,
            stdout=open(address + ".log", "w"),  # noqa: SIM115 - the server's
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ConnectionError("the fork server has ended")
        data += part
    return data


def server(address: str, session: int) -> None:
    """Fork processes on request until the process ``session`` has ended."""
    import selectors
    import shutil

    _import()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)  # it exists only when it accepts connections
    with selectors.DefaultSelector() as events:
        events.register(listener, selectors.EVENT_READ)
        events.register(os.pidfd_open(session), selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is listener:
                    link, _ = listener.accept()
                    child = _fork(link, (listener, events))
                    watched = (child, os.pidfd_open(child), link)
                    events.register(link, selectors.EVENT_READ, watched)
                    events.register(watched[1], selectors.EVENT_READ, watched)
                elif key.data is None:
                    return shutil.rmtree(os.path.dirname(address))  # the session has ended
                else:
                    child, handle, link = key.data
                    os.kill(child, signal.SIGKILL)  # no effect if it has ended
                    _, status = os.waitpid(child, 0)
                    events.unregister(handle)
                    events.unregister(link)
                    with contextlib.suppress(OSError):
                        link.sendall(status.to_bytes(8, "big"))
                    link.close()
                    os.close(handle)
                    break  # the other event of this process must not be handled


def _import() -> None:
    import importlib

    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in (
        "actors.learner",
        "actors.rollout",
        "actors.teacher",
        "deepspeed",
        "seqkd.cli.main",
        "transformers.models.qwen2.modeling_qwen2",
        "vllm",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.executor.ray_utils",
        "vllm.v1.worker.cpu_worker",
    ):
        importlib.import_module(name)
    importlib.import_module("vllm").LLM  # noqa: B018 - imported at its first use


def _fork(link: socket.socket, own: tuple[contextlib.AbstractContextManager, ...]) -> int:
    """Fork a process that runs what the client at ``link`` asks for, and report it its PID."""
    size, files, _, _ = socket.recv_fds(link, 8, 3)
    request = json.loads(_receive(link, int.from_bytes(size, "big")))
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        link.sendall(child.to_bytes(8, "big"))
        return child
    for resource in (*own, link):
        resource.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.nice(request["niceness"] - os.nice(0))
    _run(request["arguments"])
    raise AssertionError("not reached")


def _run(arguments: list[str]) -> None:
    """Do in this process what the Python executable would do with ``arguments``, and exit."""
    import atexit
    import importlib
    import runpy
    import threading
    import traceback

    import torch
    import vllm.v1.executor.ray_utils

    # Read from the environment when torch was imported.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    del sys.modules["ray"]
    importlib.reload(vllm.v1.executor.ray_utils)  # with Ray this time
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(arguments[0])
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[2] == "serve":
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        server(sys.argv[1], int(sys.argv[3]))
    else:
        sys.exit(client(sys.argv[1], sys.argv[3:]))
