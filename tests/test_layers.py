"""The architecture as a test: a module of app/ imports only from lower layers, and Ray stays in deployments/."""

import ast
from pathlib import Path

import pytest

APP = Path(__file__).parent.parent / "app"
LAYERS = [
    {"domain", "errors", "placement"},
    {"settings"},
    {"telemetry", "config", "dashboard"},
    {"loaders", "chunking", "sparse", "citations"},
    {"prompts", "grounding"},
    {"gate", "models", "sizing"},
    {"embedding", "store", "llm"},
    {"planning", "ingestion"},
    {"retrieval"},
    {"chat"},
    {"services"},
    {"api", "client", "doctor", "launcher"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(APP.rglob("*.py"))


def area(path: Path) -> str:
    """Name the file or the folder that stands directly in app/."""
    return path.relative_to(APP).parts[0].removesuffix(".py")


def imported_areas(path: Path) -> set[str]:
    """List what of app/ a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "app":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("app."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_layer() -> None:
    assert {area(path) for path in MODULES if path != APP / "__init__.py"} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(APP)))
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    own = area(path)
    upward = (
        {name for name in imported_areas(path) if name != own and LEVEL[name] >= LEVEL[own]} if own in LEVEL else set()
    )
    assert not upward


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(APP)))
def test_no_module_of_the_service_imports_ray(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("ray", "deployments") for name in names)
