"""Python in a PID namespace of its own, where it is process 1, as the command of a container is."""

import os
import shutil
import subprocess
import sys

import pytest


def as_process_one(code: str) -> str:
    """What the code prints; skips the test where the system allows no such namespace."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"] + ["--map-root-user"] * (os.getuid() != 0)
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system allows no PID namespace")
    done = subprocess.run([*unshare, sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
