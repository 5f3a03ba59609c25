"""What a run is trained with: versions of the code, and the machine."""

import contextlib
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax


def code_version() -> dict:
    """What the code is: packages, Python, and the commit where it runs from a repository."""
    packages = ("slmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    root = Path(__file__).resolve().parents[1]
    git = None
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", root, "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"git": git, "versions": versions, "python": platform.python_version()}


def provenance() -> dict:
    """Where and with what a run trains. Nothing from the environment's variables: they may hold secrets."""
    devices = [device.device_kind for device in jax.devices()]
    return {**code_version(), "argv": sys.argv, "devices": devices, "time": time.time()}
