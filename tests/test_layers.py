"""The architecture as a test: a module of app/ imports only from lower layers, and Ray stays in deployments/."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from app.config import DEPLOYMENTS

APP = Path(__file__).parent.parent / "app"
LAYERS = [
    {"addresses", "batch_queue", "domain", "errors", "identifiers", "placement"},
    {"settings", "json_limits"},
    {"batch_lines"},
    {"telemetry", "config", "dashboard", "durable"},
    {"keys"},
    {"access", "rates"},
    {
        "loaders",
        "chunking",
        "sparse",
        "citations",
        "json_schema",
        "control_tokens",
        "fusion",
        "selection",
        "self_query",
        "significance",
    },
    {"prompts", "grounding", "known_items"},
    {"gate", "answerability", "models", "sizing", "acceleration"},
    {"embedding", "store", "llm"},
    {"planning", "query_encoding", "ingestion", "deletion", "reranking", "uploads"},
    {"files", "offline_input", "offline_output"},
    {"batches"},
    {"webhooks"},
    {"retrieval"},
    {"reindexing", "chat", "ingestion_jobs"},
    {"collection"},
    {"catalog"},
    {"services"},
    {"api", "client", "doctor", "launcher"},
    {"batch_worker"},
    {"evaluation", "changeover", "offline_answers"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(APP.rglob("*.py"))

KNOW_THE_FILE = {"config", "launcher", "doctor"}
"""They read the Serve config, so they may tell topologies apart."""
TOPOLOGY = re.compile(rf"topolog|\b(?:{'|'.join(DEPLOYMENTS)})\b", re.IGNORECASE)
DEPLOYMENT_NAMES = {name for names in DEPLOYMENTS.values() for name in names}
IMPLEMENTATIONS = re.compile(r"(?:Handle|Engine|LocalRetriever)$")
"""What stands behind the two interfaces: whoever asks which one it was given branches on the topology."""


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


def test_the_modules_of_the_page_import_each_other_in_no_circle() -> None:
    imports = {
        path.name: set(re.findall(r'from "\./([\w/.]+)"', path.read_text(encoding="utf-8")))
        for path in (APP / "web").glob("*.js")
    }
    order = list(TopologicalSorter(imports).static_order())
    assert order[-1] == "main.js"
    assert all((APP / "web" / name).exists() for name in order)


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """The strings that stand for themselves."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def topology_named(tree: ast.AST) -> Iterator[str]:
    """Find what code that cannot know its topology would not say."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if node not in prose:
                found = TOPOLOGY.search(text) is not None or text in DEPLOYMENT_NAMES
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.alias(name=text):
                found = TOPOLOGY.search(text) is not None or text == "DEPLOYMENTS"
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
                text = ast.unparse(kind)
                found = any(IMPLEMENTATIONS.search(name) for name in re.findall(r"\w+", text))
            case _:
                continue
        if found:
            yield f"line {getattr(node, 'lineno', '?')}: {text}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(APP)))
def test_core_code_has_no_branch_on_the_topology(path: Path) -> None:
    if area(path) not in KNOW_THE_FILE:
        assert not list(topology_named(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "if settings.topology: pass",
        "if name == 'monolith': pass",
        "path = 'deployments.application:two_tier'",
        "from app.config import DEPLOYMENTS",
        "handle = get('Retriever')",
        "isinstance(self._llm, LLMHandle)",
        "isinstance(llm, (int, VLLMEngine))",
    ],
)
def test_a_branch_on_the_topology_is_found(code: str) -> None:
    assert list(topology_named(ast.parse(code)))
