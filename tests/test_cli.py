"""The verbs of `cleave`, as a user types them: against the real service, and against one that misbehaves on cue."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from app import client
from app.cli import main
from app.client import Client
from app.domain import Document
from app.errors import InvalidRequest, UnknownFilter

PROGRAM = Path(sys.executable).with_name("cleave")
QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"
VERBS = ["serve", "doctor", "ingest", "ask", "search", "batch", "eval", "reindex"]
VERBS += ["documents", "documents show", "documents delete", "keys", "keys create", "keys list", "keys revoke"]


def cleave(url: str, *arguments: str | Path, input: str | None = None) -> Result:
    environment = {"CLEAVE_URL": url, "COLUMNS": "200"}
    return CliRunner().invoke(main, [str(one) for one in arguments], env=environment, input=input)


def cleave_json(url: str, *arguments: str | Path) -> Any:
    result = cleave(url, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def cleave_program(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as a program whose output goes to another."""
    return subprocess.run(
        [PROGRAM, *arguments],
        env={**os.environ, "CLEAVE_URL": url, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- Help and wrong use ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = cleave("unused", *verb.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: cleave {verb}" in result.stdout


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, app.cli; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"httpx", "pydantic", "numpy", "torch", "vllm", "ray", "transformers"} & set(loaded)


def test_the_version_is_told() -> None:
    assert cleave("unused", "--version").stdout.startswith("cleave 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "x", "--filter", "author"], "--filter: 'author' is not KEY=VALUE."),
        (["ask", "x", "--url", "htp://x"], "is not an address. Write it like http://127.0.0.1:8000."),
        (["serve", "/nowhere.yaml"], "/nowhere.yaml: there is no such file."),
        (["ingest", "/nowhere"], "does not exist"),
        (["ask", "x", "--top-k", "0"], "--top-k"),
        (["fly"], "No such command"),
        (["reindex", "--config", "/nowhere.yaml"], "/nowhere.yaml: there is no such file."),
        (["reindex", "--rollback", "--discard"], "--rollback and --discard: name one of them."),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = cleave("http://127.0.0.1:1", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "x"],
        ["ask", "x", "--json"],
        ["search", "x"],
        ["documents"],
        ["documents", "show", "x"],
        ["ingest", __file__],
        ["reindex", "--rollback"],
    ],
    ids=" ".join,
)
def test_no_service_is_one_clear_line_and_exit_code_3(arguments: list[str], tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    note.write_text("A note.", encoding="utf-8")
    result = cleave("http://127.0.0.1:1", *(note if one == __file__ else one for one in arguments))
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        "cleave: No service answers at http://127.0.0.1:1. Start it with `make serve` or `cleave serve`, "
        "or name another with --url.\n"
    )


# --- Ask and search --------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_sources_and_how_it_was_made(live_service: str) -> None:
    result = cleave(live_service, "ask", QUESTION)
    assert result.exit_code == 0
    answer, sources, status = result.stdout.split("\n\n")
    assert "52 minutes" in answer
    assert "* [1] Post-mortem of the Reading Room outage of 14 October · Noor Hallivant" in sources
    assert "https://wiki.lanternfish.example/post-mortems/" in sources
    assert status.startswith("quoted from the sources · ")
    assert status.endswith(" tokens\n")


def test_a_question_that_the_documents_do_not_answer_says_so(live_service: str) -> None:
    result = cleave(live_service, "ask", "Who won the 1998 football World Cup?")
    assert result.exit_code == 0
    assert "Sources, none cited" in result.stdout
    assert "the documents hold no answer · " in result.stdout


def test_piped_output_has_no_colours_and_an_ascii_terminal_is_no_error(live_service: str) -> None:
    done = cleave_program(live_service, "ask", QUESTION, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "52 minutes" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_the_whole_completion(live_service: str) -> None:
    completion = cleave_json(live_service, "ask", QUESTION, "--top-k", "2")
    assert completion["object"] == "chat.completion"
    assert len(completion["rag"]["sources"]) == 2


def test_without_documents_an_engine_that_quotes_has_nothing_to_say(live_service: str) -> None:
    result = cleave(live_service, "ask", "Hello", "--raw")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("cleave: No language model is available")


def test_an_author_limits_the_answer_to_their_writing(live_service: str) -> None:
    found = cleave_json(live_service, "search", "autoscaling", "--author", "Marit Oldershaw", "--top-k", "20")
    assert {source["metadata"]["author"] for source in found} == {"Marit Oldershaw"}


def test_values_of_one_field_are_alternatives(live_service: str) -> None:
    authors = ("--author", "Marit Oldershaw", "--filter", "author=Noor Hallivant")
    found = cleave_json(live_service, "search", "autoscaling", *authors, "--top-k", "50")
    assert {source["metadata"]["author"] for source in found} == {"Marit Oldershaw", "Noor Hallivant"}


def test_a_filter_matches_a_number_and_the_text_that_looks_like_one(live_service: str, tmp_path: Path) -> None:
    lines = [
        {"id": "edition-1", "text": "Of tides and the moon.", "edition": 7},
        {"id": "edition-2", "text": "Of tides in a narrow strait.", "edition": "7"},
    ]
    path = tmp_path / "editions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    cleave_json(live_service, "ingest", path)
    found = cleave_json(live_service, "search", "tides", "--filter", "edition=7")
    assert {source["document_id"] for source in found} == {"edition-1", "edition-2"}


def test_an_unknown_filter_is_wrong_use_and_names_the_fields(live_service: str) -> None:
    result = cleave(live_service, "ask", "x", "--filter", "colour=red")
    assert result.exit_code == 2
    assert "No document has the field 'colour'" in result.stderr
    assert "author" in result.stderr


def test_search_shows_passages(live_service: str) -> None:
    result = cleave(live_service, "search", "size of the KV cache", "--top-k", "1")
    assert result.exit_code == 0
    assert "articles/" in result.stdout


@pytest.mark.parametrize("verb", ["ask", "search"])
def test_what_the_question_names_is_shown(live_service: str, verb: str) -> None:
    result = cleave(live_service, verb, "What does Noor Hallivant say about the Reading Room outage?")
    assert result.exit_code == 0
    assert 'Only documents with author "Noor Hallivant", named in the question.' in result.stdout


def test_a_search_that_no_document_can_match_says_why(live_service: str) -> None:
    result = cleave(live_service, "search", "outage", "--author", "Noor Halivant")
    assert result.stdout == (
        'No document matches the filters: none has author "Noor Halivant". Did you mean "Noor Hallivant"?\n'
    )


def test_a_proxy_from_the_environment_does_not_come_between(live_service: str) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:1")
    done = cleave_program(live_service, "search", "tides", "--json", NO_PROXY="", no_proxy="", **proxies)
    assert (done.returncode, done.stderr) == (0, "")


# --- Documents -------------------------------------------------------------------------------------------------------


def test_documents_are_listed_as_table_and_as_json(live_service: str) -> None:
    listed = {document["id"] for document in cleave_json(live_service, "documents")}
    assert "articles/chunk-by-heading.md" in listed
    assert "Chunk by heading, because authors already did the work" in cleave(live_service, "documents").stdout


async def test_all_pages_are_listed(live_service: str) -> None:
    async with Client(live_service) as connected:
        paged = [document["id"] async for document in connected.documents(page_size=3)]
        whole = [document["id"] async for document in connected.documents()]
    assert len(paged) > 3
    assert paged == whole


def test_a_document_is_shown_with_its_text(live_service: str) -> None:
    result = cleave(live_service, "documents", "show", "articles/chunk-by-heading.md")
    assert "author: Marit Oldershaw" in result.stdout
    assert "Every team that builds retrieval" in result.stdout


def test_a_document_is_deleted_after_a_question(live_service: str, tmp_path: Path) -> None:
    note = tmp_path / "to delete?.md"
    note.write_text("A short-lived note.", encoding="utf-8")
    cleave_json(live_service, "ingest", note)
    assert cleave(live_service, "documents", "delete", note.name, input="n\n").exit_code == 1
    assert cleave_json(live_service, "documents", "show", note.name)["text"] == "A short-lived note."
    deleted = cleave(live_service, "documents", "delete", note.name, input="y\n")
    assert deleted.exit_code == 0
    assert "Deleted to delete?.md, version 1, chunks: 1. Queries that looked for them and found none" in deleted.stderr
    assert "1 by filter, 1 by dense, 1 by sparse" in deleted.stderr
    again = cleave(live_service, "documents", "delete", note.name, "--yes")
    assert again.exit_code == 1
    assert "There is no document 'to delete?.md'" in again.stderr


def test_the_url_may_stand_before_or_after_the_verb(live_service: str) -> None:
    nowhere, shown = "http://127.0.0.1:1", ("show", "articles/chunk-by-heading.md")
    assert cleave(nowhere, "documents", "--url", live_service, *shown).exit_code == 0
    assert cleave(nowhere, "documents", *shown, "--url", live_service).exit_code == 0


# --- Ingest ----------------------------------------------------------------------------------------------------------


def write_notes(folder: Path) -> Path:
    """A folder with two documents, and with what is left out."""
    notes = folder / "notes"
    for name in ("plan.md", "deep/er/idea.TXT", ".hidden.md", ".git/config.md", "photo.png", "data.bin"):
        path = notes / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{folder.name} says {name}.", encoding="utf-8")
    return notes


def test_a_folder_is_taken_in_once_and_a_changed_file_again(live_service: str, tmp_path: Path) -> None:
    notes = write_notes(tmp_path)
    first = cleave_json(live_service, "ingest", notes)
    assert (first["created"], first["failed"], first["chunks"], first["truncated_chunks"]) == (2, 0, 2, 0)
    assert sorted(first["skipped"]) == ["notes/data.bin", "notes/photo.png"]
    listed = {document["id"] for document in cleave_json(live_service, "documents")}
    assert {one for one in listed if one.startswith("notes/")} == {"notes/plan.md", "notes/deep/er/idea.TXT"}

    (notes / "plan.md").write_text("Another plan.", encoding="utf-8")
    second = cleave_json(live_service, "ingest", notes)
    assert (second["created"], second["updated"], second["unchanged"], second["chunks"]) == (0, 1, 1, 1)


def test_a_file_that_cannot_be_read_is_told_and_the_rest_goes_on(live_service: str, tmp_path: Path) -> None:
    good, empty, picture = (tmp_path / name for name in ("good.md", "empty.md", "picture.png"))
    good.write_text("A good note.", encoding="utf-8")
    empty.touch()
    picture.touch()
    result = cleave(live_service, "ingest", good, empty, picture)
    assert result.exit_code == 1
    assert "failed  empty.md: is empty" in result.stdout
    assert "picture.png: unknown kind of file; known are .md" in result.stdout
    header, numbers = (line.split() for line in result.stdout.splitlines()[-2:])
    assert header[:5] == ["created", "updated", "unchanged", "failed", "chunks"]
    assert numbers[:5] == ["1", "0", "0", "2", "1"]


def test_lines_of_a_corpus_are_documents_and_bad_ones_are_named(live_service: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": f"line-{n}", "title": "Line", "text": f"Line {n}.", "weight": n}) for n in range(40)]
    corpus.write_text("\n".join([*lines, "", "no json", '{"text": "no id"}']), encoding="utf-8")
    result = cleave(live_service, "ingest", corpus, "--json")
    summary = json.loads(result.stdout)
    assert (result.exit_code, summary["created"], summary["failed"]) == (1, 40, 2)
    assert "corpus.jsonl line 42" in summary["failures"][0]["error"]
    assert cleave_json(live_service, "documents", "show", "line-7")["metadata"] == {"weight": 7}


def test_of_lines_with_the_same_id_the_first_is_taken_in(live_service: str, tmp_path: Path) -> None:
    corpus = tmp_path / "repeated.jsonl"
    texts = {"repeated": "First.", "other": "Other.", " repeated ": "Second."}
    corpus.write_text("\n".join(json.dumps({"id": id.strip(), "text": text}) for id, text in texts.items()), "utf-8")
    for expected in ("created", "unchanged"):
        summary = json.loads(cleave(live_service, "ingest", corpus, "--json").stdout)
        assert (summary[expected], summary["failed"]) == (2, 1)
        assert summary["failures"][0]["error"] == (
            "repeated.jsonl line 3: repeats the id 'repeated' of line 1, which is kept"
        )
    assert cleave_json(live_service, "documents", "show", "repeated")["text"] == "First."


def test_a_file_over_the_limit_of_the_service_is_not_even_read(live_service: str, tmp_path: Path) -> None:
    good, huge = tmp_path / "beside.md", tmp_path / "huge.txt"
    good.write_text("A good note.", encoding="utf-8")
    with huge.open("wb") as file:
        file.truncate(300 * 2**20)
    result = cleave(live_service, "ingest", huge, good)
    assert result.exit_code == 1
    assert "failed  huge.txt: has 300.0 MiB, the limit is 25.0 MiB: split it" in result.stdout
    assert cleave_json(live_service, "documents", "show", "beside.md")["version"] == 1


def test_an_ingestion_that_was_killed_goes_on_where_it_was(live_service: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": f"resumed-{n}", "text": f"Note {n} of a long evening. " * 20}) for n in range(100)]
    corpus.write_text("\n".join(lines), encoding="utf-8")

    def num_held() -> int:
        return sum(one["id"].startswith("resumed-") for one in cleave_json(live_service, "documents"))

    command = [sys.executable, "-c", "from app.cli import main; main()", "ingest", str(corpus), "--url", live_service]
    sending = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while num_held() == 0:
        assert sending.poll() is None, "it was done before it could be killed"
    sending.kill()
    sending.wait()
    held = num_held()
    assert 0 < held < 100
    summary = cleave_json(live_service, "ingest", corpus)
    # What was on its way when it was killed may still have been written since.
    assert held <= summary["unchanged"] < 100
    assert (summary["created"] + summary["unchanged"], summary["updated"], summary["failed"]) == (100, 0, 0)
    versions = Counter(one["version"] for one in cleave_json(live_service, "documents") if "resumed-" in one["id"])
    # The request that was on its way may be written by both, and counts as both.
    assert versions[1] + versions[2] == 100
    assert versions[2] <= client.MAX_DOCUMENTS_PER_REQUEST


def test_one_document_that_the_service_refuses_does_not_take_its_batch_along(live_service: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    ids = ["before", "x" * 513, "after"]
    corpus.write_text("\n".join(json.dumps({"id": one, "text": "Text."}) for one in ids), encoding="utf-8")
    summary = json.loads(cleave(live_service, "ingest", corpus, "--json").stdout)
    assert (summary["created"], summary["failed"]) == (2, 1)
    assert "at most 512 characters" in summary["failures"][0]["error"]


def test_two_files_that_would_be_one_document_are_not_mixed_up(live_service: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.md").write_text(f"Twin {folder}.", encoding="utf-8")
    result = cleave(live_service, "ingest", tmp_path / "a/twin.md", tmp_path / "b/twin.md", tmp_path / "a/twin.md")
    assert result.exit_code == 1
    assert "would be the same document" in result.stdout
    assert cleave_json(live_service, "documents", "show", "twin.md")["text"] == "Twin a."


def test_a_folder_with_nothing_to_read_is_wrong_use(tmp_path: Path) -> None:
    empty = cleave("http://127.0.0.1:1", "ingest", tmp_path)
    assert empty.exit_code == 2
    assert f"nothing to ingest in {tmp_path}: there is no file. Known are .md" in empty.stderr
    (tmp_path / "photo.png").touch()
    unknown = cleave("http://127.0.0.1:1", "ingest", tmp_path)
    assert unknown.exit_code == 2
    assert "only files of unknown kinds (1 .png)" in unknown.stderr


@given(st.lists(st.integers(0, 3 * client.MAX_BYTES_PER_REQUEST // 2), max_size=60), st.integers(1, 16))
def test_batches_keep_order_and_limits(sizes: list[int], max_items: int) -> None:
    text = "x" * max(sizes, default=0)
    items: list[client.Item] = [(str(n), Document(str(n), "", text[:size])) for n, size in enumerate(sizes)]
    batches = list(client._batches(items, max_items=max_items))
    assert [item for batch in batches for item in batch] == items
    for batch in batches:
        assert 1 <= len(batch) <= max_items
        assert len(batch) == 1 or sum(map(client._size, batch)) <= client.MAX_BYTES_PER_REQUEST


# --- A service that misbehaves ---------------------------------------------------------------------------------------


@dataclass
class Reply:
    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def error_reply(status: int, code: str, message: str, **headers: str) -> Reply:
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return Reply(json.dumps({"error": error}), status, headers)


@contextmanager
def scripted_service(*replies: Reply, received: list[Any] | None = None) -> Iterator[str]:
    """A server on a real socket that gives each reply once, the last one for ever; bodies go to `received`."""
    remaining = list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if received is not None:
                received.append(json.loads(body))
            reply = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(reply.body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


BUSY = error_reply(429, "overloaded", "Too many requests. Try again.", Retry_After="0")
RECEIPT = {"document_id": "note.md", "status": "created", "num_chunks": 1, "num_truncated_chunks": 0, "error": None}
TAKEN = Reply(json.dumps({"object": "list", "data": [RECEIPT]}))


def events(*chunks: dict[str, Any] | str) -> Reply:
    lines = (chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    return Reply("".join(f": ping\n\ndata: {line}\n\n" for line in lines))


def text_chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


@pytest.fixture
def note(tmp_path: Path) -> Path:
    path = tmp_path / "note.md"
    path.write_text("A note.", encoding="utf-8")
    return path


def test_a_busy_service_is_asked_again(note: Path) -> None:
    with scripted_service(BUSY, BUSY, TAKEN) as url:
        assert cleave_json(url, "ingest", note)["created"] == 1


def test_a_service_that_stays_busy_ends_the_run(note: Path) -> None:
    with scripted_service(BUSY) as url:
        result = cleave(url, "ingest", note)
    assert (result.exit_code, result.stderr) == (3, "cleave: Too many requests. Try again.\n")


def test_what_was_taken_in_before_the_service_went_is_told(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(n), "text": "Text."}) for n in range(client.MAX_DOCUMENTS_PER_REQUEST + 1)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    with scripted_service(TAKEN, BUSY) as url:
        result = cleave(url, "ingest", corpus, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["created"] == 1


def test_an_internal_error_fails_its_documents_and_no_others(tmp_path: Path) -> None:
    for n in range(client.MAX_FILES_PER_REQUEST + 1):
        (tmp_path / f"{n}.md").write_text("A note.", encoding="utf-8")
    with scripted_service(error_reply(500, "internal_error", "Internal error."), TAKEN) as url:
        summary = json.loads(cleave(url, "ingest", tmp_path, "--json").stdout)
    assert (summary["created"], summary["failed"]) == (1, client.MAX_FILES_PER_REQUEST)


def test_an_error_in_the_stream_ends_it_with_the_reason() -> None:
    error = {"error": {"message": "The language model broke off.", "type": "server_error", "param": None, "code": "x"}}
    with scripted_service(events(text_chunk("It lasted"), error)) as url:
        result = cleave(url, "ask", QUESTION)
    assert (result.exit_code, result.stdout) == (1, "It lasted\n")
    assert result.stderr == "cleave: The language model broke off.\n"


def test_a_stream_without_its_end_is_no_answer() -> None:
    with scripted_service(events(text_chunk("It lasted"))) as url:
        result = cleave(url, "ask", QUESTION)
    assert result.exit_code == 1
    assert result.stderr.startswith("cleave: The answer broke off before its end.")


def test_a_line_separator_inside_an_answer_does_not_cut_it() -> None:
    with scripted_service(events(text_chunk("one\u2028two"), "[DONE]")) as url:
        result = cleave(url, "ask", QUESTION)
    assert result.exit_code == 0
    assert result.stdout.startswith("one\u2028two\n")


def test_documents_cannot_steer_the_terminal() -> None:
    source = {"n": 1, "title": "\x1b[2Jbold [red]title[/red]", "text": "a\x07b\x9b1m", "document_id": ":smile:"}
    with scripted_service(Reply(json.dumps({"data": [source]}))) as url:
        shown = cleave(url, "search", "x").stdout
    assert "[2Jbold [red]title[/red]" in shown
    assert ":smile:" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


@pytest.mark.parametrize("reply", [Reply("<html>Not found</html>", 404), Reply("hello"), Reply("[]", 500)], ids=str)
def test_a_program_that_is_no_cleave_is_told_apart(reply: Reply) -> None:
    with scripted_service(reply) as url:
        result = cleave(url, "search", "x")
    assert result.exit_code == 1
    assert "Is it a Cleave service" in result.stderr


def test_a_defect_is_one_line_too() -> None:
    with scripted_service(Reply('{"data": [{}]}')) as url:
        result = cleave(url, "search", "x")
    assert result.exit_code == 1
    assert result.stderr == (
        "cleave: unexpected error (KeyError: 'text'). Set CLEAVE_TRACEBACK=1 to see where, and report it.\n"
    )


@pytest.mark.parametrize("verb", ["ask", "search"])
def test_ctrl_c_ends_quietly(verb: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [str(PROGRAM), verb, QUESTION, "--url", url]
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=120) == (b"", b"")
    assert process.returncode == 130


def test_a_reader_that_leaves_is_no_error(live_service: str) -> None:
    pipeline = f"{PROGRAM} documents show articles/chunk-by-heading.md --url {live_service} | head -1"
    done = subprocess.run(["/bin/sh", "-c", pipeline], capture_output=True, text=True, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


# --- Conversation ----------------------------------------------------------------------------------------------------


def turns(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


def test_questions_of_a_conversation_follow_on(live_service: str) -> None:
    questions = f"{QUESTION}\n\nWhat had caused it?\n"
    shown = cleave(live_service, "ask", "--chat", input=questions).stdout
    first, _, second = shown.partition(" tokens\n")
    assert "52 minutes" in first
    assert "[1] Post-mortem" in second


def test_a_conversation_holds_what_was_answered_and_only_that() -> None:
    broken = error_reply(500, "internal_error", "It broke.")
    received: list[Any] = []
    replies = events(text_chunk("one"), "[DONE]"), broken, events(text_chunk("three"), "[DONE]")
    with scripted_service(*replies, received=received) as url:
        result = cleave(url, "ask", "--chat", "1?", input="2?\n3?\n")
    assert [turns(body) for body in received] == [["1?"], ["1?", "one", "2?"], ["1?", "one", "3?"]]
    assert (result.exit_code, result.stderr) == (1, "cleave: It broke.\n")


def test_a_conversation_in_json_is_a_line_for_each_answer(live_service: str) -> None:
    result = cleave(live_service, "ask", "--chat", "--json", input=f"{QUESTION}\nWhat had caused it?\n")
    assert result.exit_code == 0
    assert [json.loads(line)["object"] for line in result.stdout.splitlines()] == ["chat.completion"] * 2


def test_in_a_conversation_ctrl_c_stops_the_answer_and_ctrl_d_ends_it() -> None:
    master, terminal = pty.openpty()
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [str(PROGRAM), "ask", "--chat", "1?", "--url", f"http://127.0.0.1:{server.getsockname()[1]}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=terminal, stdout=pipe, stderr=pipe, preexec_fn=heed) as process:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                process.send_signal(signal.SIGINT)
                assert process.stderr
                while b"stopped" not in process.stderr.readline():
                    pass
            os.write(master, b"2?\n")
            connection, _ = server.accept()
            with connection:
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(2**16)
                assert turns(json.loads(request.partition(b"\r\n\r\n")[2])) == ["2?"]
                body = events(text_chunk("two"), "[DONE]").body
                connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            os.write(master, b"\x04")
            assert process.communicate(timeout=120)[0].startswith(b"two\n")
    os.close(master)
    os.close(terminal)
    assert process.returncode == 0


def test_the_shell_completes_verbs_and_ids(live_service: str) -> None:
    def completions(words: str) -> str:
        position = str(len(words.split(" ")) - 1)
        environment = {"_CLEAVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
        return cleave_program(live_service, **environment).stdout

    assert completions("cleave docu").split() == ["documents"]
    assert completions("cleave documents show articles/chunk").split() == ["articles/chunk-by-heading.md"]
    assert completions("cleave documents show nothing-like-it").split() == []


# --- Client ----------------------------------------------------------------------------------------------------------


async def test_the_client_raises_what_the_service_raised(live_service: str) -> None:
    async with Client(live_service) as connected:
        with pytest.raises(UnknownFilter) as caught:
            await connected.search("x", top_k=None, filters={"colour": "red"})
        assert caught.value.param == "filters.colour"
        with pytest.raises(InvalidRequest):
            await connected.chat("")


async def test_readiness_names_the_parts(live_service: str) -> None:
    async with Client(live_service) as connected:
        found = await connected.readiness()
    assert found is not None
    assert found["parts"]["retriever"]["status"] == "ok"


async def test_there_is_no_readiness_without_a_cleave() -> None:
    async with Client("127.0.0.1:1") as connected:
        assert await connected.readiness() is None


# --- Doctor ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, url: str) -> Path:
    config = {
        "http_options": {"host": "127.0.0.1", "port": int(url.rpartition(":")[2])},
        "applications": [
            {
                "import_path": "deployments.application:monolith",
                "args": {"data_dir": str(folder), "llm": {"engine": "extractive", "device": "cpu"}},
            }
        ],
    }
    path = folder / "service.json"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML.
    return path


def test_the_doctor_finds_the_running_service(live_service: str, tmp_path: Path) -> None:
    result = cleave("unused", "doctor", "--config", write_config(tmp_path, live_service), "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    port = live_service.rpartition(":")[2]
    assert findings[f"port {port}"]["detail"] == "held by the running Cleave"
    assert live_service in findings["service"]["detail"]


def test_the_doctor_shows_a_table_and_fails_when_something_does(tmp_path: Path) -> None:
    result = cleave("unused", "doctor", "--config", tmp_path / "nowhere.yaml")
    assert result.exit_code == 1
    assert "there is no such file" in result.stdout
    assert "1 failed" in result.stdout.splitlines()[-1]
