"""A version of its own for each deployment, so that a changed setting restarts only what reads it.

Serve gives all deployments of a config file one version, a hash that covers all of `args`: any change there would
restart every replica. Here a deployment's version covers what it is built from, and the code.
"""

import hashlib
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from ray.serve import Deployment
from ray.serve._private.config import DeploymentConfig

PACKAGES = [Path(__file__).parent.parent / name for name in ("app", "deployments")]


class _VersionedConfig(DeploymentConfig):  # type: ignore[misc]  # Ray is not typed.
    """A config whose version stays: the task that builds the application assigns the common one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "version":
            super().__setattr__(name, value)


def versioned(deployment: Deployment, *inputs: Any) -> Deployment:
    """Give the deployment a version made of `inputs` (models, dataclasses, plain values) and the code."""
    digest = hashlib.sha256(_code_digest())
    digest.update(to_json([deployment.name, *inputs]))
    own = deployment.options()
    fields = dict(own._deployment_config)
    # Building an application makes Serve forget how its deployments scale, and it takes that up again only for those
    # whose config differs from before. This name does, and means nothing else.
    names = {*fields["user_configured_option_names"], f"built-{uuid.uuid4().hex}"}
    own._deployment_config = _VersionedConfig.model_construct(
        **{**fields, "version": digest.hexdigest(), "user_configured_option_names": names}
    )
    return own


@cache
def _code_digest() -> bytes:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(package.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.digest()
