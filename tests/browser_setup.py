"""Find a Chromium for the tests of the chat page, or install one: `python -m tests.browser_setup`."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Name the browser's program; None when there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install_browser() -> None:
    """Install it from the system's packages where that is possible without asking."""
    if find_browser() or not shutil.which("apt-get") or os.geteuid() != 0:
        return
    print("cleave: installing Chromium for the tests of the chat page (once) ...", flush=True)
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
        done = subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
        if done.returncode != 0:
            print(f"cleave: {' '.join(command)} failed; the tests of the chat page will be skipped.", file=sys.stderr)
            return


if __name__ == "__main__":
    install_browser()
