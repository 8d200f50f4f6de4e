"""A service of its own for a benchmark, its files in a folder that is removed in the end."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.running_service import running, write_application


@contextlib.contextmanager
def served(application: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Serve one application; give its address and the dashboard's once it is ready."""
    with tempfile.TemporaryDirectory(prefix="cleave-benchmark-") as folder:
        config = write_application(Path(folder), application, logging_config={"enable_access_log": False})
        with running(config, environment) as service:
            dashboard = re.search(r"dashboard +(\S+)", service.output)
            yield service.url, dashboard[1] if dashboard else ""
