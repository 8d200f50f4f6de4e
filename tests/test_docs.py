"""The documentation is true: what it names exists, and what it states as a default is the default."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml

from app import errors
from app.api.sse import CompletionWriter
from app.chat import AnswerEnd, AnswerEvent, AnswerStart
from app.cli import main
from app.cli.ask import DEGRADED, GROUNDED
from app.domain import Grounded
from app.errors import CleaveError
from app.prompts import CITING_INSTRUCTIONS
from app.settings import Branch, Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
VERBS = set(typer.main.get_command(main).commands)  # type: ignore[attr-defined]

NEVER_ANSWERED = {"unreadable_file"}
"""What is reported per file."""
FOREIGN_CODES = {"bad_request", "method_not_allowed", "unsupported_media_type"}
"""Of errors that are the web framework's own."""

FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")
FILE = re.compile(r"\b(?:app|deployments|tests|docs|requirements)/[\w/.-]*\w")
SETTING_COMMENT = re.compile(r"^( {6,})# ", re.MULTILINE)

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def section(heading: str) -> str:
    """What stands in the README under a heading of the second level."""
    return README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    lines = (line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line] for line in lines]


def code_of(cell: str) -> str:
    found = INLINE.fullmatch(cell)
    return found[1] if found else ""


def named(text: str) -> set[str]:
    """The first cells of all table rows that are one piece of code."""
    return {code_of(row[0]) for row in rows(text)} - {""}


def code(text: str) -> str:
    """All code of a page, blocks and inline."""
    blocks = [block["code"] for block in FENCED.finditer(text)]
    return "\n".join([*blocks, *INLINE.findall(FENCED.sub("", text))])


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def leaves(branch: type[Branch], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings with their defaults, by dotted key."""
    for name, field in branch.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Branch):
            yield from leaves(field.annotation, values[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values[name]


DEFAULTS = dict(leaves(Settings, Settings().model_dump(mode="json")))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a YAML tree by dotted key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in DEFAULTS:
            yield from flat(value, f"{key}.")
        else:
            yield key, value


# --- README ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["app", "deployments"])
def test_the_layout_lists_exactly_the_files_that_exist(folder: str) -> None:
    listed = re.search(rf"^{folder}/ .*\n((?:  .*\n)*)", section("Layout"), re.MULTILINE)
    assert listed
    names = {line.split()[0] for line in listed[1].splitlines()}
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    folders = {f"{path.name}/" for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert names == files | folders


def test_the_layout_names_what_stands_in_the_root() -> None:
    block = FENCED.search(section("Layout"))
    names = re.findall(r"^(\S+) ", block["code"] if block else "", re.MULTILINE)
    assert names
    assert len(names) == len(set(names))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_configuration_table_names_every_setting_with_its_default() -> None:
    table = [row for row in rows(section("Configuration")) if code_of(row[0])]
    assert [code_of(row[0]) for row in table] == list(DEFAULTS)
    assert {code_of(key): yaml.safe_load(code_of(default)) for key, default, *_ in table} == DEFAULTS


def test_the_error_table_names_every_code_with_its_status() -> None:
    table = {code_of(row[1]): int(row[0]) for row in rows(section("Errors")) if row[0].isdigit()}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CleaveError)]
    answered = {kind.code: kind.status for kind in kinds if kind.code not in NEVER_ANSWERED}
    assert {code: status for code, status in table.items() if code not in FOREIGN_CODES} == answered


async def test_the_table_of_rag_names_every_field() -> None:
    async def events() -> AsyncIterator[AnswerEvent]:
        yield AnswerStart((), "")
        yield AnswerEnd((), "refused", "stop", 0, 0, 0, 0, (), (), {})

    completion = await CompletionWriter(model="cleave", base_url="").completion(events())
    tables = section("What an answer carries")
    assert named(tables) == set(completion["rag"]) | set(get_args(Grounded))


def test_the_terminal_has_words_for_whatever_an_answer_says_of_itself() -> None:
    [degraded] = [row[1] for row in rows(section("What an answer carries")) if code_of(row[0]) == "degraded"]
    assert set(INLINE.findall(degraded)) == set(DEGRADED)
    assert set(get_args(Grounded)) == set(GROUNDED)


def test_the_table_of_commands_names_every_verb_and_target() -> None:
    commands = code(section("Commands"))
    assert set(re.findall(r"^cleave (\w+)", commands, re.MULTILINE)) == VERBS
    assert set(re.findall(r"^make ([\w-]+)$", commands, re.MULTILINE)) == TARGETS - {"help"}


@pytest.mark.parametrize("block", [block["code"] for block in FENCED.finditer(README) if block["language"] == "python"])
def test_python_in_the_readme_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_the_example_of_training_data_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [block] = [one["code"] for one in FENCED.finditer((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))]
    names: dict[str, Any] = {}
    exec(compile(block, "training.md", "exec"), names)
    system, user, assistant = names["made"]["messages"]
    assert system == {"role": "system", "content": CITING_INSTRUCTIONS}
    assert user["content"].startswith("[1] Post-mortem of the Reading Room outage")
    assert user["content"].endswith("Question: How long did the outage last?")
    assert assistant["content"] == "It lasted 52 minutes. [1]"
    assert set(names["made"]["format"]) == {"prompt.format", "prompt.chat_template"}


@pytest.mark.parametrize(
    "block", [block["code"] for block in FENCED.finditer(README) if block["language"] in ("json", "yaml")]
)
def test_json_and_yaml_in_the_readme_can_be_read(block: str) -> None:
    assert yaml.safe_load(block)


# --- Every page ------------------------------------------------------------------------------------------------------


@each_document
def test_every_relative_link_resolves(path: Path) -> None:
    for target, anchor in LINK.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not anchor or anchor in slugs(page.read_text(encoding="utf-8")), anchor


@each_document
def test_every_target_of_make_exists(path: Path) -> None:
    found = re.findall(r"\bmake (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", code(path.read_text(encoding="utf-8")))
    assert set(found) <= TARGETS


@each_document
def test_every_verb_of_cleave_exists(path: Path) -> None:
    assert set(re.findall(r"\bcleave ([a-z]+)", code(path.read_text(encoding="utf-8")))) <= VERBS


@each_document
def test_every_file_that_is_named_exists(path: Path) -> None:
    found = FILE.findall(code(path.read_text(encoding="utf-8")))
    assert not [name for name in found if "NAME" not in name and not (ROOT / name).exists()]


# --- serve_config.yaml -----------------------------------------------------------------------------------------------


@pytest.fixture
def shown() -> dict[str, Any]:
    """The settings of serve_config.yaml, those in comments too."""
    text = SETTING_COMMENT.sub(r"\1", (ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    return dict(flat(yaml.safe_load(text)["applications"][0]["args"]))


def test_the_serve_config_shows_every_setting_but_the_secrets(shown: dict[str, Any]) -> None:
    assert set(shown) == set(DEFAULTS) - {"store.api_key", "llm.api_key", "batch.webhook_secret"}


def test_the_serve_config_shows_defaults(shown: dict[str, Any]) -> None:
    """Where a setting is empty by default, what is shown is an example."""
    having = {key: default for key, default in DEFAULTS.items() if default is not None and key in shown}
    assert {key: shown[key] for key in having} == having
