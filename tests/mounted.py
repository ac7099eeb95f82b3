"""Run a script where something else is mounted: `mounted.py SHELL-COMMANDS SCRIPT FLAGS...`, for nobody but this process."""

import ctypes
import runpy
import subprocess
import sys

CLONE_NEWNS = 0x20000  # linux/sched.h; os.unshare is there from Python 3.12 on


def mount(commands: str) -> None:
    """Run the commands in a mount namespace that this process alone is in from now on."""
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    subprocess.run(["bash", "-ec", f"mount --make-rprivate /\n{commands}"], check=True)


if __name__ == "__main__":
    mount(sys.argv[1])
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
