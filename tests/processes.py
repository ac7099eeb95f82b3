"""The entries in processes of their own, forked from one that holds the libraries: a start takes 0.1 s instead of 5 s.

The child runs the script as `python script.py flags` does, as __main__ with its own signals, environment, folder and exit
status. What libraries read while they are imported (HF_HUB_CACHE, ...) is that of the tests: where a test changes such a
variable, it starts Python anew, or has another server fork.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKED = multiprocessing.get_context("forkserver")


@contextmanager
def environment(variables: dict[str, str]):
    """These alone while it lasts."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@cache
def server(*changed: tuple[str, str | None]) -> forkserver.ForkServer:
    """A process that holds the libraries, imported with these variables changed or, for None, unset."""
    made = forkserver.ForkServer()
    made.set_forkserver_preload(["preloaded"])
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    with environment({k: v for k, v in (os.environ | dict(changed) | {"PYTHONPATH": path}).items() if v is not None}):
        made.ensure_running()
    return made


class Started:
    """A running script, with the part of subprocess.Popen's interface that the tests use.

    changed: variables that are others than those of the tests when the libraries are imported. Each such set costs a server.
    """

    def __init__(self, script, *flags, cwd: Path | None = None, changed: tuple = ()):
        self.args = [str(script), *map(str, flags)]
        self.folder = tempfile.TemporaryDirectory()  # goes with this object
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for file in self.files:
            file.touch()
        variables = {name: value for name, value in (os.environ | dict(changed)).items() if value is not None}
        self.process = FORKED.Process(target=run, args=(self.args, self.files, variables, str(cwd or os.getcwd())))
        forkserver.connect_to_new_process = server(*changed).connect_to_new_process  # which starts the process
        self.process.start()
        atexit.register(self.process.kill)  # where a test fails, pytest would wait for it at its end
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def output(self) -> tuple[str, str]:
        """What was written so far to stdout and stderr."""
        return tuple(file.read_text() for file in self.files)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def finished(script, *flags, **options) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    process = Started(script, *flags, **options)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            process.process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def several(n: int, script, *flags) -> list[Started]:
    """n processes of one run, with the environment that torchrun would give them; nothing watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n)}
    processes = []
    for rank in range(n):
        with environment(os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}):
            processes.append(Started(script, *flags))
    return processes


def run(argv: list[str], outputs: list[Path], variables: dict[str, str], folder: str) -> None:
    """What the child does."""
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    import torch

    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
