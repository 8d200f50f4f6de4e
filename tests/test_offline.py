"""An offline batch without Ray: what is read of its input, how its output is kept, and the two halves of a line."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from app.access import Caller, caller
from app.api.completions import complete
from app.api.schemas import ChatCompletionRequest
from app.batch_lines import is_success
from app.domain import SearchQuery, SearchResult
from app.errors import InvalidRequest, StorageFull
from app.llm.extractive import ExtractiveEngine
from app.offline_answers import Completion, MeasuredLLM, Preparation, settings_of_answers
from app.offline_input import MAX_RANGE_LINES, MIN_RANGE_LINES, fingerprint, read_index, read_range
from app.offline_output import Output, part_path
from app.retrieval import Retriever
from app.services import Services, build_services
from app.settings import AnswerSettings, LLMSettings, PlanningSettings, Settings
from tests.conftest import sample_settings
from tests.waiting import wait_until

in_one_loop = pytest.mark.asyncio(loop_scope="module")

QUESTION = "How long did the Reading Room outage last?"
UNKNOWN = "Who won the 1998 football World Cup?"
RUN = {"input": {"sha256": "ab", "num_bytes": 1}, "settings": {"llm": {"model": "one"}}}
ANSWER = json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": {}}}).encode()
FAILURE = json.dumps({"custom_id": None, "response": None, "error": {}}).encode()


def asking(custom_id: str, question: str = QUESTION, **body: Any) -> bytes:
    content = {"messages": [{"role": "user", "content": question}], **body}
    return json.dumps({"custom_id": custom_id, "url": "/v1/chat/completions", "body": content}).encode()


def write(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


# --- The input -------------------------------------------------------------------------------------------------------


@given(
    lines=st.lists(
        st.one_of(
            st.sampled_from([b"", b"   ", b"{", b"[]", b"\xff\xfe"]),
            st.integers(0, 5).map(lambda n: b'{"question": "why?", "id": "%d"}' % n),
            st.just(b'{"question": "why?"}'),
        ),
        max_size=60,
    ),
    num_done=st.integers(0, 60),
    ends=st.booleans(),
)
@settings(deadline=None)
def test_the_ranges_hold_each_request_that_is_not_done_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], num_done: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    index = read_index(path, num_done=num_done)
    assert index.num_requests == len(expected)
    found = [(one.number, one.content.rstrip(b"\n")) for range in index.ranges for one in read_range(path, range)]
    assert found == expected[num_done:]
    ids: list[Any] = [json.loads(line).get("id", f"line-{n}") if b"question" in line else None for n, line in expected]
    repeated = {n for place, (n, _) in enumerate(expected) if ids[place] is not None and ids[place] in ids[:place]}
    first = expected[num_done][0] if num_done < len(expected) else len(lines) + 1
    assert {number for range in index.ranges for number in range.repeated} == {n for n in repeated if n >= first}


def test_ranges_grow_with_the_file_and_end_before_they_are_large(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [b'{"question": "why?"}'] * 300_000)
    told: list[int] = []
    index = read_index(path, tell=told.append)
    sizes = [range.num_requests for range in index.ranges]
    assert sizes[0] == MIN_RANGE_LINES
    assert max(sizes) == sizes[-2] == MAX_RANGE_LINES
    assert sum(sizes) == 300_000
    assert told == sorted(told)
    assert len(told) == 30
    long = write(tmp_path / "long.jsonl", [b'{"question": "%s"}' % (b"y" * 700_000)] * 4)
    assert [range.num_requests for range in read_index(long).ranges] == [1, 1, 1, 1]


def test_memory_does_not_grow_with_the_number_of_lines(tmp_path: Path) -> None:
    def peak(num_lines: int) -> int:
        path = write(tmp_path / f"{num_lines}.jsonl", [b'{"question": "why?"}'] * num_lines)
        tracemalloc.start()
        read_index(path)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
        return used

    assert peak(60_000) < peak(10_000) + 2**20


def test_an_input_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        fingerprint(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_index(tmp_path)


# --- The output ------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_results_have_their_name_when_there_are_all(target: Path) -> None:
    with Output.open(target, RUN) as output:
        output.append([ANSWER, FAILURE], num_failed=1)
        assert not target.exists()
        output.finish()
    assert target.read_bytes() == ANSWER + b"\n" + FAILURE + b"\n"
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


@given(num_bytes=st.integers(0, 3 * (len(ANSWER) + 1)))
@settings(deadline=None)
def test_a_run_goes_on_behind_the_last_whole_result(tmp_path_factory: pytest.TempPathFactory, num_bytes: int) -> None:
    target = tmp_path_factory.mktemp("output") / "out.jsonl"
    with Output.open(target, RUN) as output:
        output.append([ANSWER] * 3, num_failed=0)
    os.truncate(part_path(target), num_bytes)
    num_whole = num_bytes // (len(ANSWER) + 1)
    with Output.open(target, RUN) as output:
        assert (output.num_done, output.num_failed) == (num_whole, 0)
        output.append([FAILURE] * (3 - num_whole), num_failed=3 - num_whole)
        output.finish()
    assert target.read_bytes().splitlines() == [ANSWER] * num_whole + [FAILURE] * (3 - num_whole)


def test_what_a_power_cut_has_left_is_cut_off(target: Path) -> None:
    with Output.open(target, RUN) as output:
        output.append([ANSWER, FAILURE], num_failed=1)
    with part_path(target).open("ab") as file:
        file.write(b"\0" * 100 + b"\n" + ANSWER + b"\n")
    with Output.open(target, RUN) as output:
        assert (output.num_done, output.num_failed, output.is_continued) == (2, 1, True)
    assert part_path(target).read_bytes() == ANSWER + b"\n" + FAILURE + b"\n"


def test_results_of_something_else_are_left_alone(target: Path) -> None:
    with Output.open(target, RUN) as output:
        output.append([ANSWER], num_failed=0)
    other = {"input": {"sha256": "cd", "num_bytes": 1}, "settings": {"llm": {"model": "two"}}}
    with pytest.raises(InvalidRequest, match=r"begun with another input.sha256, settings.llm.model\. Use the earlier"):
        Output.open(target, other)
    with Output.open(target, RUN) as output:
        assert output.num_done == 1
    with Output.open(target, other, overwrite=True) as output:
        assert output.num_done == 0
    assert part_path(target).read_bytes() == b""


def test_results_without_a_word_of_what_they_are_of_are_left_alone(target: Path) -> None:
    write(part_path(target), [ANSWER])
    with pytest.raises(InvalidRequest, match="begun with another file of requests"):
        Output.open(target, RUN)


def test_an_output_that_is_there_is_replaced_only_when_asked_for_and_at_the_end(target: Path) -> None:
    target.write_text("precious")
    with pytest.raises(InvalidRequest, match=r"is there already\. Name another file, or --overwrite it\."):
        Output.open(target, RUN)
    with Output.open(target, RUN, overwrite=True) as output:
        output.append([ANSWER], num_failed=0)
        assert target.read_text() == "precious"
        output.finish()
    assert target.read_bytes() == ANSWER + b"\n"


@pytest.mark.parametrize("name", ["folder", "nowhere/out.jsonl"])
def test_an_output_that_can_be_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidRequest, match="cannot be a file"):
        Output.open(tmp_path / name, RUN)


def test_two_do_not_write_the_same_output(target: Path) -> None:
    with Output.open(target, RUN), pytest.raises(InvalidRequest, match="Another `cleave batch` writes"):
        Output.open(target, RUN)
    Output.open(target, RUN).close()


def test_a_full_disk_is_one_line_and_leaves_whole_results(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [len(ANSWER) + 20]
    really_write = os.write

    def write_while_there_is_room(descriptor: int, content: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written = really_write(descriptor, content[: room[0]])
        room[0] -= num_written
        return num_written

    with Output.open(target, RUN) as output:
        monkeypatch.setattr(os, "write", write_while_there_is_room)
        output.append([ANSWER], num_failed=0)
        with pytest.raises(StorageFull, match=r"is full\. Nothing is lost: free some space and run the same again"):
            output.append([ANSWER, ANSWER], num_failed=0)
        assert part_path(target).read_bytes() == ANSWER + b"\n"
        room[0] = 10_000
        output.append([FAILURE], num_failed=1)
        output.finish()
    assert target.read_bytes().splitlines() == [ANSWER, FAILURE]


WRITER = """
import json, sys
from pathlib import Path
from app.offline_output import Output
with Output.open(Path(sys.argv[1]), {"input": 1}) as output:
    print(output.num_done, flush=True)
    for n in range(output.num_done, 1_000_000):
        output.append([json.dumps({"n": n, "response": None, "fill": "x" * (n * 7919 % 5000)}).encode()], num_failed=1)
"""


def test_a_kill_at_any_point_loses_no_result_and_doubles_none(target: Path) -> None:
    """The writer is killed while it writes, time after time; each goes on where the one before it was."""
    num_before = 0
    for turn in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout
        num_done = int(writer.stdout.readline())
        assert num_done >= num_before
        size = part_path(target).stat().st_size
        wait_until(lambda size=size: part_path(target).stat().st_size > size + 100_000, 30)  # type: ignore[misc]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        num_before = num_done + turn % 2
    with Output.open(target, {"input": 1}) as output:
        assert output.num_done == output.num_failed > num_before
    numbers = [json.loads(line)["n"] for line in part_path(target).read_bytes().splitlines()]
    assert numbers == list(range(len(numbers)))


def test_a_limit_on_the_size_of_files_is_told(target: Path) -> None:
    code = WRITER.replace(
        "with Output", "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwith Output", 1
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    ended = subprocess.run(
        [sys.executable, "-c", code, str(target)], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert "cannot be written (File too large)" in ended.stderr
    with Output.open(target, {"input": 1}) as output:
        assert output.num_done > 10


# --- The two halves of a line ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    built = await build_services(sample_settings(tmp_path_factory.mktemp("services")))
    yield built
    await built.close()


async def through_both(
    services: Services, lines: list[bytes], tmp_path: Path, searcher: Retriever | None = None, **options: Any
) -> list[dict[str, Any]]:
    own = services.settings.model_copy(update=options)
    path = write(tmp_path / "lines.jsonl", lines)
    [range] = read_index(path).ranges
    prepared = await Preparation(own, "cpu", services.retriever, base_url="http://here").prepare(
        read_range(path, range), range.repeated
    )
    second = Completion(own, "cpu", searcher or services.retriever, services.llm, base_url="http://here")
    return [dict(await second.complete(one)) for one in prepared]


@in_one_loop
async def test_a_line_is_answered_as_online(services: Services, tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "What is the Reading Room?"},
        {"role": "assistant", "content": "A room."},
    ]
    bodies = [
        {"messages": [{"role": "user", "content": QUESTION}]},
        {"messages": [{"role": "user", "content": UNKNOWN}]},
        {"messages": [*conversation, {"role": "user", "content": "How long did its outage last?"}]},
        {"messages": [{"role": "user", "content": QUESTION}], "rag": {"top_k": 2, "dialect": "markdown"}},
        {"messages": [{"role": "user", "content": QUESTION}], "rag": {"filters": {"author": "Noor Hallivant"}}},
    ]
    lines = [json.dumps({"custom_id": f"q{n}", "body": body}).encode() for n, body in enumerate(bodies)]
    results = await through_both(services, lines, tmp_path)
    caller.set(Caller(None, "default"))
    for n, (one, body) in enumerate(zip(results, bodies, strict=True)):
        online = await complete(services, ChatCompletionRequest.model_validate(body), base_url="http://here")
        offline = one["response"]["body"]
        assert (one["custom_id"], one["response"]["status_code"], one["error"]) == (f"q{n}", 200, None)
        assert offline["choices"] == online["choices"]
        assert set(offline["rag"]) == set(online["rag"])
        different = {"request_id", "timings_ms"}
        assert {k: v for k, v in offline["rag"].items() if k not in different} == {
            k: v for k, v in online["rag"].items() if k not in different
        }
        assert set(offline["rag"]["timings_ms"]) == set(online["rag"]["timings_ms"])


@in_one_loop
async def test_each_bad_line_is_a_result_that_says_why(services: Services, tmp_path: Path) -> None:
    lines = [
        b"not json",
        asking("same"),
        asking("same"),
        asking("model", model="gpt-9"),
        asking("stream", stream=True),
        asking("role", messages=[{"role": "assistant", "content": "x"}]),
        b'{"question": " "}',
        b'{"question": "Why?", "rag": {"top_k": 1000}}',
        json.dumps({"question": QUESTION}).encode(),
    ]
    results = await through_both(services, lines, tmp_path)
    assert [is_success(one) for one in results] == [n in (1, 8) for n in range(9)]
    unasked = [(one["custom_id"], one["error"]["code"]) for one in results if one["response"] is None]
    assert unasked == [(None, "invalid_json_line"), ("same", "duplicate_custom_id"), (None, "invalid_value")]
    assert results[2]["error"]["message"] == "Line 3: custom_id 'same' stands in an earlier line too."
    asked = [
        (one["custom_id"], one["response"]["status_code"], one["response"]["body"]["error"]["code"])
        for one in results
        if one["response"] and not is_success(one)
    ]
    assert asked == [
        ("model", 404, "model_not_found"),
        ("stream", 400, "unsupported_parameter"),
        ("role", 400, "invalid_value"),
        ("line-8", 400, "invalid_value"),
    ]
    assert results[8]["custom_id"] == "line-9"


@in_one_loop
async def test_what_needs_no_model_is_done_in_the_first_half(services: Services, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl", [asking("known"), asking("unknown", UNKNOWN), asking("raw", model="extractive")]
    )
    preparation = Preparation(services.settings, "cpu", services.retriever, base_url="http://here")
    known, unknown, raw = await preparation.prepare(read_range(path, read_index(path).ranges[0]))
    assert unknown.result is not None
    assert unknown.result["response"]["body"]["rag"]["grounded"] == "refused"
    assert known.result is None
    assert known.found is not None
    assert known.found.passages
    assert (raw.result, raw.found) == (None, None)


class NoSearch:
    async def search(self, query: SearchQuery) -> SearchResult:
        raise AssertionError("what was found before is enough")


@in_one_loop
async def test_the_second_half_searches_only_for_what_the_model_has_rewritten(
    services: Services, tmp_path: Path
) -> None:
    [one] = await through_both(services, [asking("q")], tmp_path, NoSearch())  # type: ignore[arg-type]
    assert one["response"]["body"]["rag"]["sources"]
    turns = [{"role": "user", "content": "What is the Reading Room?"}, {"role": "assistant", "content": "A room."}]
    follow_up = asking("f", messages=[*turns, {"role": "user", "content": QUESTION}])
    asked: list[SearchQuery] = []

    class Counting:
        async def search(self, query: SearchQuery) -> SearchResult:
            asked.append(query)
            return await services.retriever.search(query)

    # The quoting engine cannot rewrite, so it is searched for with the question before it, in the second half.
    planning = PlanningSettings(rewrite="always")
    [one] = await through_both(services, [follow_up], tmp_path, Counting(), planning=planning)  # type: ignore[arg-type]
    assert one["response"]["body"]["rag"]["degraded"] == ["rewriting_skipped"]
    assert [query.text for query in asked] == [QUESTION]


@in_one_loop
async def test_the_load_of_the_model_is_measured(services: Services, tmp_path: Path) -> None:
    llm = MeasuredLLM(ExtractiveEngine(), max_num_seqs=1)
    path = write(tmp_path / "in.jsonl", [asking("q")])
    own = services.settings
    [prepared] = await Preparation(own, "cpu", services.retriever, base_url="").prepare(
        read_range(path, read_index(path).ranges[0])
    )
    idle = llm.load()
    assert (idle.busy_s, idle.full_s) == (0, 0)
    await Completion(own, "cpu", services.retriever, llm, base_url="").complete(prepared)
    load = llm.load()
    assert 0 < load.full_s <= load.busy_s < load.seconds
    assert (await llm.info()).id == "extractive"
    both = load + load
    assert both.seconds == 2 * load.seconds


def test_a_run_is_known_by_the_settings_that_change_answers() -> None:
    before = settings_of_answers(Settings(), "cpu")
    assert json.loads(json.dumps(before)) == before
    same = Settings(
        llm=LLMSettings(max_num_seqs=7, num_threads=1, api_key="secret"), answer=AnswerSettings(timeout_s=5)
    )
    assert settings_of_answers(same, "cpu") == before
    assert settings_of_answers(Settings(answer=AnswerSettings(max_tokens=7)), "cpu") != before
    assert settings_of_answers(Settings(), "gpu") != before
