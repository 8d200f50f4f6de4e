"""Find the programs of the system that tests use, or install them: `python -m tests.system_setup`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REDIS_SERVERS = ("redis-server", "valkey-server")
PACKAGES = {"chromium": BROWSERS, "redis-server": REDIS_SERVERS}
"""Debian's, each with the programs of which one will do."""


def find_browser() -> str | None:
    """Name the browser's program; None when there is none."""
    return _find(BROWSERS)


def find_redis() -> str | None:
    """Name the program of a Redis server; None when there is none."""
    return _find(REDIS_SERVERS)


def install_missing() -> None:
    """Install them from the system's packages where that is possible without asking."""
    missing = [package for package, programs in PACKAGES.items() if not _find(programs)]
    if not missing or not shutil.which("apt-get") or os.geteuid() != 0:
        return
    print(f"cleave: installing {' and '.join(missing)} for the tests (once) ...", flush=True)
    # In run level 1 Debian starts no service that it installs.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing]):
        done = subprocess.run(command, env=environment, capture_output=True)
        if done.returncode != 0:
            print(f"cleave: {' '.join(command)} failed; tests that need these are skipped.", file=sys.stderr)
            return


def _find(programs: Sequence[str]) -> str | None:
    return next(filter(None, map(shutil.which, programs)), None)


if __name__ == "__main__":
    install_missing()
