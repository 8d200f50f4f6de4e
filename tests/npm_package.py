"""Files of npm packages, each at a pinned version and checksum, fetched once into the virtual environment."""

import base64
import hashlib
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import httpx

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
FOLDER = Path(sys.prefix) / "npm-packages"
PINNED = {
    "axe-core": (
        "4.14.1",
        "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    ),
    "marked": (
        "18.2.1",
        "sha512-ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==",
    ),
}


def npm_package(name: str) -> Path | None:
    """Give the folder of a package; None when it is not here and cannot be fetched."""
    version, integrity = PINNED[name]
    folder = FOLDER / f"{name}-{version}"
    if not folder.exists():
        try:
            response = httpx.get(f"{REGISTRY.rstrip('/')}/{name}/-/{name}-{version}.tgz", follow_redirects=True)
            archive = response.raise_for_status().content
        except httpx.HTTPError as error:
            print(f"cleave: the npm package {name} cannot be fetched ({error}); its tests will be skipped.")
            return None
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
        if found != integrity:
            raise ValueError(f"{name} {version} has the checksum {found}, and not {integrity}.")
        _unpack(archive, folder)
    return folder


def _unpack(archive: bytes, folder: Path) -> None:
    """Unpack it whole or not at all: several test processes may do so at once."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(draft, filter="data")
    try:
        (draft / "package").rename(folder)
    except OSError:
        assert folder.exists()
    shutil.rmtree(draft)
