"""Jobs of several worker processes on this machine."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# A worker waits for the others without end: what does not finish is killed and fails the test.
TIMEOUT = 600


def free_ports(count):
    """Returns ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def start(module, arguments, environment=None):
    """Starts a module of the tests in a process of its own, its output in one pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    """Waits for processes and returns their exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], outputs


def run_job(job, folder, num_workers=2):
    """Runs a job of `tests.worker_job` and returns exit codes and outputs, one a worker."""
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(num_workers)]}
    processes = []
    for index in range(num_workers):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {"TF_CONFIG": json.dumps(config)}
        processes.append(start("tests.worker_job", [job, folder], environment))
    return finish(processes)
