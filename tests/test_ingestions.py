"""Ingestions in the background: their progress, their end, and what kills leave."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import ingestion_jobs
from app.api import ingestions as routes
from app.domain import Document, IngestReceipt
from app.durable import Hold
from app.errors import CollectionMismatch, IngestionNotFound, InvalidRequest, Overloaded, RetrieverUnavailable
from app.ingestion_jobs import MAX_STARTS, Ingestion, IngestionJobs
from app.settings import APISettings
from app.uploads import Loaded
from tests.conftest import ROOT
from tests.running_service import free_port

PATIENCE_S = 300.0


class StepwiseRetriever:
    """Takes documents in when it is let, and says how often it was asked."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.failures: list[Exception] = []
        self.calls: list[list[str]] = []
        self.num_cancelled = 0

    def let_one_go_on(self) -> None:
        """Who waits goes on, who comes next waits."""
        self.may_go_on.set()
        self.may_go_on.clear()

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        self.calls.append([document.id for document in documents])
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop()
        return [IngestReceipt(document.id, "created", num_chunks=2) for document in documents]


@pytest.fixture
def retriever() -> StepwiseRetriever:
    return StepwiseRetriever()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "WATCH_S", "MIN_RETRY_S"):
        monkeypatch.setattr(ingestion_jobs, name, 0.02)
    monkeypatch.setattr("app.uploads.MAX_DOCUMENTS_AT_ONCE", 2)


def jobs_of(folder: Path, retriever: Any) -> IngestionJobs:
    return IngestionJobs(folder, retriever, APISettings(min_free_bytes=0))


@asynccontextmanager
async def working(folder: Path, retriever: Any) -> AsyncIterator[IngestionJobs]:
    jobs = jobs_of(folder, retriever)
    jobs.start()
    try:
        yield jobs
    finally:
        await jobs.close()


async def submit(jobs: IngestionJobs, *ids: str, collection: str | None = None) -> Ingestion:
    upload = jobs.new_upload()
    upload.open()
    upload.add_documents(Loaded(0, one, Document(one, one.title(), f"About {one}.")) for one in ids)
    upload.finish({})
    return await jobs.submit(upload, collection=collection)


async def submit_files(jobs: IngestionJobs, **files: str) -> Ingestion:
    upload = jobs.new_upload()
    upload.open()
    for name, text in files.items():
        upload.begin_file(name.replace("_", "."))
        upload.write(text.encode())
        upload.end_file()
    upload.finish({})
    return await jobs.submit(upload, collection=None)


async def until(jobs: IngestionJobs, ingestion: Ingestion, is_reached: Callable[[Ingestion], bool]) -> Ingestion:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if is_reached(found := await jobs.read(ingestion.id)):
                return found
            await asyncio.sleep(0.01)


async def finished(jobs: IngestionJobs, ingestion: Ingestion) -> Ingestion:
    return await until(jobs, ingestion, lambda one: one.is_finished)


async def reported(jobs: IngestionJobs, ingestion: Ingestion) -> list[str]:
    return [one.content["document_id"] for one in await jobs.results(ingestion.id, after=0, limit=1000)]


# --- One after the other ---------------------------------------------------------------------------------------------


async def test_an_ingestion_says_how_far_it_is_and_its_files_go_at_its_end(
    tmp_path: Path, retriever: StepwiseRetriever
) -> None:
    lines = "".join(json.dumps({"id": f"l{n}", "text": f"Line {n}."}) + "\n" for n in range(3))
    async with working(tmp_path, retriever) as jobs:
        retriever.may_go_on.clear()
        files = {"a_md": "The first.", "b_exe": "?", "c_jsonl": f"{lines}\nbroken\n", "d_md": "The last."}
        sent = await submit_files(jobs, **files)
        assert (sent.status, sent.num_files, sent.num_documents) == ("queued", 4, None)
        running = await until(jobs, sent, lambda one: one.status == "running")
        assert (running.num_documents, running.num_documents_done) == (7, 0)
        assert (tmp_path / "ingestions" / sent.id / "files").exists()
        retriever.may_go_on.set()
        done = await finished(jobs, sent)
        assert (done.status, done.error, done.num_documents) == ("completed", None, 7)
        assert (done.num_documents_done, done.num_files_done, done.num_chunks, done.num_failed) == (7, 4, 10, 2)
        results = [one.content for one in await jobs.results(sent.id, after=0, limit=10)]
    told = [(one["file"], one["document_id"], one["status"]) for one in results]
    assert told == [
        ("a.md", "a.md", "created"),
        ("b.exe", "b.exe", "failed"),
        *(("c.jsonl", f"l{n}", "created") for n in range(3)),
        ("c.jsonl", "c.jsonl", "failed"),
        ("d.md", "d.md", "created"),
    ]
    assert not (tmp_path / "ingestions" / sent.id / "files").exists()
    assert not list((tmp_path / "uploads").iterdir())


async def test_ingestions_are_worked_off_in_the_order_in_which_they_came(
    tmp_path: Path, retriever: StepwiseRetriever
) -> None:
    async with working(tmp_path, retriever) as first, working(tmp_path, retriever) as second:
        sent = [await submit(jobs, f"{n}a", f"{n}b", f"{n}c") for n, jobs in enumerate([first, second] * 4)]
        for one in sent:
            assert (await finished(second, one)).status == "completed"
    assert [name for call in retriever.calls for name in call] == [f"{n}{x}" for n in range(8) for x in "abc"]


async def test_results_come_in_pages_that_go_on_where_the_last_one_ended(
    tmp_path: Path, retriever: StepwiseRetriever
) -> None:
    async with working(tmp_path, retriever) as jobs:
        sent = await submit(jobs, *(f"d{n}" for n in range(7)))
        await finished(jobs, sent)
        cursor, seen = 0, []
        while page := await jobs.results(sent.id, after=cursor, limit=3):
            seen += [one.content["document_id"] for one in page]
            cursor = page[-1].cursor
        assert seen == [f"d{n}" for n in range(7)]
        for wrong in (1, cursor - 1, cursor + 1, 10**9):
            with pytest.raises(InvalidRequest, match="no cursor"):
                await jobs.results(sent.id, after=wrong, limit=1)


async def test_ingestions_are_listed_newest_first_by_collection(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    jobs = jobs_of(tmp_path, retriever)
    sent = [(await submit(jobs, "a", collection="notes" if n % 2 else None)).id for n in range(5)]
    newest_first = sent[::-1]
    assert [one.id for one in await jobs.recent(after=None, limit=10)] == newest_first
    assert [one.id for one in await jobs.recent(after=newest_first[1], limit=2)] == newest_first[2:4]
    assert [one.id for one in await jobs.recent(after=None, limit=10, collection="notes")] == newest_first[1::2]


@pytest.mark.parametrize("name", ["ing_0", "..", "ing_" + "0" * 24, "ing_" + "g" * 24, "../uploads", ""])
async def test_what_is_not_there_is_said_to_be_elsewhere(
    tmp_path: Path, retriever: StepwiseRetriever, name: str
) -> None:
    jobs = jobs_of(tmp_path, retriever)
    for ask in (jobs.read(name), jobs.cancel(name), jobs.results(name, after=0, limit=1)):
        with pytest.raises(IngestionNotFound, match="another machine"):
            await ask


# --- Ends before the end ---------------------------------------------------------------------------------------------


async def test_one_that_waits_is_cancelled_at_once(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    async with working(tmp_path, retriever) as jobs:
        retriever.may_go_on.clear()
        running, waiting = await submit(jobs, "a"), await submit(jobs, "b")
        await until(jobs, running, lambda one: one.status == "running")
        cancelled = await jobs.cancel(waiting.id)
        assert cancelled.status == "cancelled"
        assert not (tmp_path / "ingestions" / waiting.id / "files").exists()
        retriever.may_go_on.set()
        assert (await finished(jobs, running)).status == "completed"
        assert (await jobs.cancel(running.id)).status == "completed"
    assert retriever.calls == [["a"]]


async def test_one_that_is_worked_on_elsewhere_is_cancelled_in_the_middle(
    tmp_path: Path, retriever: StepwiseRetriever
) -> None:
    async with working(tmp_path, retriever) as jobs:
        retriever.may_go_on.clear()
        sent, following = await submit(jobs, "a", "b", "c", "d"), await submit(jobs, "e")
        await until(jobs, sent, lambda one: len(retriever.calls) == 1)
        retriever.let_one_go_on()
        await until(jobs, sent, lambda one: len(retriever.calls) == 2)
        await jobs_of(tmp_path, retriever).cancel(sent.id)
        cancelled = await finished(jobs, sent)
        assert (cancelled.status, retriever.num_cancelled) == ("cancelled", 1)
        retriever.may_go_on.set()
        assert (await finished(jobs, following)).status == "completed"
        assert await reported(jobs, sent) == ["a", "b"]


async def test_work_waits_for_a_retriever_that_is_down(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    down = RetrieverUnavailable("The retriever is restarting. Try again shortly.", retry_after_s=1)
    retriever.failures = [down]
    async with working(tmp_path, retriever) as jobs:
        retriever.may_go_on.clear()
        sent = await submit(jobs, "a", "b", "c")
        await until(jobs, sent, lambda one: len(retriever.calls) == 1)
        retriever.let_one_go_on()
        waiting = await until(jobs, sent, lambda one: one.notice is not None)
        assert (waiting.status, waiting.notice) == ("running", down.message)
        retriever.may_go_on.set()
        done = await finished(jobs, sent)
    assert (done.status, done.notice, done.num_documents_done) == ("completed", None, 3)
    assert retriever.calls == [["a", "b"], ["a", "b"], ["c"]]


async def test_work_goes_on_when_a_full_disk_has_room_again(
    tmp_path: Path, retriever: StepwiseRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion_jobs, "MAX_RETRY_S", 0.02)
    retriever.failures = [OSError(errno.ENOSPC, "No space left on device") for _ in range(2 * MAX_STARTS)]
    async with working(tmp_path, retriever) as jobs:
        done = await finished(jobs, await submit(jobs, "a", "b", "c"))
    assert (done.status, done.num_documents_done) == ("completed", 3)


async def test_too_many_that_wait_are_refused(
    tmp_path: Path, retriever: StepwiseRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion_jobs, "MAX_KEPT", 0)
    monkeypatch.setattr(ingestion_jobs, "MAX_WAITING", 2)
    jobs = jobs_of(tmp_path, retriever)
    for _ in range(2):
        await jobs.check_room()
        await submit(jobs, "a")
    with pytest.raises(Overloaded):
        await jobs.check_room()


@pytest.mark.parametrize(
    ("failure", "error"),
    [(CollectionMismatch("Rebuild it."), "Rebuild it."), (ZeroDivisionError("secret"), "Internal error")],
)
async def test_what_cannot_go_on_fails_and_the_next_one_begins(
    tmp_path: Path, retriever: StepwiseRetriever, failure: Exception, error: str
) -> None:
    retriever.failures = [failure]
    async with working(tmp_path, retriever) as jobs:
        sent, following = await submit(jobs, "a"), await submit(jobs, "b")
        failed = await finished(jobs, sent)
        assert failed.status == "failed"
        assert (failed.error or "").startswith(error)
        assert (await finished(jobs, following)).status == "completed"


async def test_what_ends_the_process_again_and_again_is_given_up(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    sent = await submit(jobs_of(tmp_path, retriever), "a", "b", "c", "d", "e")
    folder = tmp_path / "ingestions" / sent.id
    async with working(tmp_path, retriever) as jobs:
        await until(jobs, sent, lambda one: one.num_documents_done >= 2)
        retriever.may_go_on.clear()
        await until(jobs, sent, lambda one: one.status != "queued")
    state = json.loads((folder / "state.json").read_text())
    if state["status"] == "running":
        assert state["num_starts"] == 0, "it was interrupted on purpose"
    # As so many processes leave it that were killed at the same place.
    content = {**state, "status": "running", "finished_at": None, "num_starts": MAX_STARTS, "worker": "another"}
    (folder / "files").mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(content))
    async with working(tmp_path, retriever) as jobs:
        failed = await finished(jobs, sent)
    assert failed.status == "failed"
    assert f"ended {MAX_STARTS} times at this place, after {state['num_documents_done']} documents" in str(failed.error)


# --- Another goes on -------------------------------------------------------------------------------------------------


async def test_another_process_goes_on_where_the_first_one_ended(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    lines = "".join(json.dumps({"id": f"l{n}", "text": f"Line {n}."}) + "\n" for n in range(6))
    async with working(tmp_path, retriever) as first:
        sent = await submit_files(first, a_md="The first.", b_jsonl=lines, c_md="The last.")
        await until(first, sent, lambda one: one.num_documents_done >= 2)
        retriever.may_go_on.clear()
    before = await reported(jobs_of(tmp_path, retriever), sent)
    with (tmp_path / "ingestions" / sent.id / "results.jsonl").open("a") as log:
        log.write('{"file": "cut sh')  # As a kill leaves it.
    retriever.may_go_on.set()
    async with working(tmp_path, retriever) as second:
        done = await finished(second, sent)
        assert await reported(second, sent) == ["a.md", *(f"l{n}" for n in range(6)), "c.md"]
    assert before == (await reported(second, sent))[: len(before)]
    assert (done.status, done.num_documents_done, done.num_documents, done.num_chunks) == ("completed", 8, 8, 16)


async def test_a_result_cut_short_before_any_other_is_forgotten(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    jobs = jobs_of(tmp_path, retriever)
    sent = await submit(jobs, "a", "b", "c")
    (tmp_path / "ingestions" / sent.id / "results.jsonl").write_text('{"file": "cut sh')  # As a kill leaves it.
    async with working(tmp_path, retriever) as jobs:
        assert (await finished(jobs, sent)).status == "completed"
        assert await reported(jobs, sent) == ["a", "b", "c"]


async def test_nobody_works_on_what_another_holds(tmp_path: Path, retriever: StepwiseRetriever) -> None:
    jobs = jobs_of(tmp_path, retriever)
    sent = await submit(jobs, "a")
    hold = Hold.take(tmp_path / "ingestions" / sent.id)
    assert hold is not None
    async with working(tmp_path, retriever) as other:
        later = await submit(other, "b")
        await asyncio.sleep(5 * ingestion_jobs.POLL_S)
        assert {(await jobs.read(one.id)).status for one in (sent, later)} == {"queued"}
        hold.release()
        assert (await finished(jobs, later)).status == "completed"
    assert retriever.calls == [["a"], ["b"]]


async def test_old_ingestions_are_forgotten(
    tmp_path: Path, retriever: StepwiseRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion_jobs, "MAX_KEPT", 2)
    async with working(tmp_path, retriever) as jobs:
        sent = [await submit(jobs, f"d{n}") for n in range(4)]
        for one in sent:
            await finished(jobs, one)
    newest = tmp_path / "ingestions" / sent[-1].id
    (newest / "files").mkdir()  # As a kill between the end and the tidying leaves it.
    old = replace(await jobs.read(sent[-2].id), finished_at=time.time() - ingestion_jobs.KEPT_S - 1)
    ingestion_jobs._write_state(tmp_path / "ingestions" / old.id, old)
    abandoned, young = (jobs.new_upload() for _ in range(2))
    for upload in (abandoned, young):
        upload.open()
        assert upload._hold is not None
        upload._hold.release()
    os.utime(abandoned.folder, (0, 0))
    async with working(tmp_path, retriever) as jobs:
        assert (await finished(jobs, await submit(jobs, "x"))).status == "completed"
        kept = [one.id for one in await jobs.recent(after=None, limit=10)]
    assert kept[1:] == [sent[-1].id]
    assert not (newest / "files").exists()
    assert (abandoned.folder.exists(), young.folder.exists()) == (False, True)


def test_workers_that_are_killed_all_the_time_lose_nothing_and_never_work_at_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "data", tmp_path / "log.txt"
    command = [sys.executable, "-m", "tests.ingestion_worker", str(folder), str(log)]
    jobs = jobs_of(folder, None)

    async def send() -> list[Ingestion]:
        return [await submit(jobs, *(f"{n}-{m}" for m in range(300))) for n in range(5)]

    sent = asyncio.run(send())
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    try:
        seen = 0
        deadline = time.monotonic() + PATIENCE_S
        while not all(asyncio.run(jobs.read(one.id)).is_finished for one in sent):
            assert time.monotonic() < deadline
            size = log.stat().st_size if log.exists() else 0
            if size > seen + 2_500:  # So much that each gets on before its end.
                seen = size
                worker = int(log.read_text().splitlines()[-1].split()[0])
                [victim] = [one for one in workers if one.pid == worker] or [workers[0]]
                victim.kill()
                victim.wait()
                workers.remove(victim)
                workers.append(subprocess.Popen(command, cwd=ROOT))
            time.sleep(0.05)
    finally:
        for worker_process in workers:
            worker_process.kill()
            worker_process.wait()
    assert {asyncio.run(jobs.read(one.id)).status for one in sent} == {"completed"}
    for n, one in enumerate(sent):
        assert asyncio.run(reported(jobs, one)) == [f"{n}-{m}" for m in range(300)]
    notes = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _ in notes}) > 2, "some were killed"
    order = [int(what.partition("-")[0]) for _, what in notes if "-" in what]
    assert order == sorted(order), "an ingestion began before the one before it had ended"
    at_work, dead = "", set()
    for pid, what in notes:
        assert pid not in dead, "two were at work at the same time"
        if what == "begin" and at_work:
            dead.add(at_work)  # It came to no end, so it was killed.
        assert what == "begin" or pid == at_work
        at_work = "" if what == "end" else pid


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(live_service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_service, trust_env=False, timeout=PATIENCE_S) as found:
        yield found


def wait_for(client: httpx.Client, ingestion_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found: dict[str, Any] = client.get(f"/v1/ingestions/{ingestion_id}").json()
        if found["status"] not in ("queued", "running"):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events_of(text: str) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Name, id and data of each event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def test_an_upload_in_the_background_is_accepted_followed_and_found(client: httpx.Client) -> None:
    files = [("files", (f"tides-{n}.md", f"# Tides {n}\n\nThe tide of day {n}.".encode())) for n in range(5)]
    upload = [*files, ("files", ("x.exe", b"?"))]
    response = client.post(
        "/v1/documents?background=true&collection=tides", files=upload, data={"metadata": '{"sea": "North"}'}
    )
    assert response.status_code == 202, response.text
    accepted = response.json()
    assert response.headers["location"] == f"/v1/ingestions/{accepted['id']}"
    assert (accepted["object"], accepted["status"], accepted["collection"]) == ("ingestion", "queued", "tides")
    done = wait_for(client, accepted["id"])
    assert (done["status"], done["error"], done["notice"]) == ("completed", None, None)
    assert done["progress"] == {
        "num_documents": 6,
        "num_documents_done": 6,
        "num_files": 6,
        "num_files_done": 6,
        "num_chunks": 5,
        "num_failed": 1,
    }
    assert [(one["file"], one["status"]) for one in done["results"]] == [
        *((f"tides-{n}.md", "created") for n in range(5)),
        ("x.exe", "failed"),
    ]
    page = client.get(f"/v1/ingestions/{accepted['id']}", params={"after": done["next"]}).json()
    assert (page["results"], page["next"]) == ([], done["next"])
    listed = client.get("/v1/ingestions", params={"collection": "tides"}).json()
    assert [one["id"] for one in listed["data"]] == [accepted["id"]]
    assert listed["has_more"] is False
    stored = client.get("/v1/documents/tides-3.md?collection=tides").json()
    assert stored["metadata"] == {"sea": "North"}
    client.delete("/v1/collections/tides")


def test_documents_as_json_go_on_in_the_background_too(client: httpx.Client) -> None:
    sent = {"documents": [{"id": "bg/1", "text": "The lamp \u2028 is lit."}, {"id": "bg/2", "text": " "}]}
    accepted = client.post("/v1/documents?background=true", json=sent)
    assert accepted.status_code == 202
    done = wait_for(client, accepted.json()["id"])
    assert [(one["file"], one["status"]) for one in done["results"]] == [("bg/1", "created"), ("bg/2", "failed")]
    assert client.delete("/v1/documents/bg/1").status_code == 200
    wrong = client.post("/v1/documents?background=true", json={"documents": []})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "documents")
    assert client.post("/v1/documents?background=perhaps", json=sent).status_code == 400


def test_a_stream_tells_everything_once_and_resumes_behind_what_was_read(client: httpx.Client) -> None:
    lines = "".join(json.dumps({"id": f"stream/{n}", "text": f"Line {n}.\u2028"}) + "\n" for n in range(5))
    accepted = client.post("/v1/documents?background=true", files={"files": ("s.jsonl", lines.encode())}).json()
    address = f"/v1/ingestions/{accepted['id']}/events"
    response = client.get(address)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = events_of(response.text)
    results = [(id, data) for name, id, data in events if name == "result"]
    assert [data["document_id"] for _, data in results] == [f"stream/{n}" for n in range(5)]
    progress = [data["progress"]["num_documents_done"] for name, _, data in events if name == "progress"]
    assert progress == sorted(progress)
    name, last_id, end = events[-1]
    assert (name, last_id, end["status"], end["progress"]["num_documents_done"]) == ("end", "end", "completed", 5)
    for number, (id, _) in enumerate(results, start=1):
        resumed = events_of(client.get(address, headers={"Last-Event-ID": str(id)}).text)
        rest = [data for name, _, data in resumed if name == "result"]
        assert rest == [data for _, data in results[number:]]
        assert resumed[-1][0] == "end"
    assert client.get(address, headers={"Last-Event-ID": "end"}).status_code == 204
    for wrong in ("7", "-1", "x", "9" * 30):
        refused = client.get(address, headers={"Last-Event-ID": wrong})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    for n in range(5):
        client.delete(f"/v1/documents/stream/{n}")


def test_a_stream_of_one_that_is_forgotten_meanwhile_ends_with_an_error(
    tmp_path: Path, retriever: StepwiseRetriever
) -> None:
    jobs = jobs_of(tmp_path, retriever)

    async def follow() -> list[str]:
        sent = await submit(jobs, "a")
        events = routes._events(jobs, sent.id, 0)
        first = await anext(events)
        (tmp_path / "ingestions" / sent.id / "state.json").unlink()
        return [first, *[line async for line in events]]

    progress, error = asyncio.run(follow())
    assert progress.startswith("event: progress\n")
    [(name, _, data)] = events_of(error)
    assert (name, data["error"]["code"]) == ("error", "ingestion_not_found")


@pytest.mark.parametrize("route", ["", "/events", "/cancel"])
def test_an_unknown_ingestion_is_not_found(client: httpx.Client, route: str) -> None:
    method = "POST" if route == "/cancel" else "GET"
    for name in ("ing_0", "ing_" + "0" * 24, "..%2f..%2fstate"):
        response = client.request(method, f"/v1/ingestions/{name}{route}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] in ("ingestion_not_found", "not_found")


def test_questions_are_answered_while_much_is_ingested_and_it_can_be_cancelled(client: httpx.Client) -> None:
    text = "The keeper of the lamp wrote this line down before the morning came again. "
    documents = [{"id": f"much/{n}", "text": f"{n}. {text * 300}"} for n in range(40)]
    accepted = client.post("/v1/documents?background=true&collection=much", json={"documents": documents}).json()
    address = f"/v1/ingestions/{accepted['id']}"
    deadline = time.monotonic() + PATIENCE_S
    while client.get(address, params={"limit": 0}).json()["status"] == "queued":
        assert time.monotonic() < deadline
    for _ in range(3):
        found = client.post("/v1/search", json={"query": "How long did the Reading Room outage last?"})
        assert found.json()["data"]
    assert client.get(address).json()["status"] == "running"
    assert client.post(f"{address}/cancel").json()["status"] == "running"
    assert wait_for(client, accepted["id"])["status"] == "cancelled"
    client.delete("/v1/collections/much")


# --- Kills of the real service ---------------------------------------------------------------------------------------


@contextmanager
def service(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.ingesting_service", str(folder), str(port)], cwd=ROOT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                assert process.poll() is None
                assert time.monotonic() < deadline
                try:
                    client.get("/livez")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_service_that_is_killed_in_the_middle_goes_on_after_its_start_and_ends(tmp_path: Path) -> None:
    ids = [f"d{n}" for n in range(600)]
    lines = "".join(json.dumps({"id": one, "text": f"What {one} says of tides and lamps."}) + "\n" for one in ids)
    files = [("files", ("a.md", b"The first.")), ("files", ("b.jsonl", lines.encode())), ("files", ("c.md", b"Last."))]
    expected = ["a.md", *ids, "c.md"]
    seen: list[dict[str, Any]] = []
    with service(tmp_path) as (process, client):
        accepted = client.post("/v1/documents?background=true", files=files).json()
        address = f"/v1/ingestions/{accepted['id']}"
        while not seen:
            seen = client.get(address, params={"limit": 1000}).json()["results"]
        process.kill()
    assert len(seen) < len(expected), "it was killed in the middle"
    with service(tmp_path) as (process, client):
        found = client.get(address, params={"limit": 1000}).json()
        assert found["status"] in ("running", "queued", "completed")
        assert found["results"][: len(seen)] == seen
        done = wait_for(client, accepted["id"])
        assert done["status"] == "completed"
        results = client.get(address, params={"limit": 1000}).json()["results"]
        assert [one["document_id"] for one in results] == expected
        assert results[: len(seen)] == seen
        assert {one["status"] for one in results} <= {"created", "unchanged"}
        page = client.get("/v1/documents", params={"limit": 1000}).json()
        assert sorted(one["id"] for one in page["data"]) == sorted(expected)
        assert {one["version"] for one in page["data"]} == {1}
