"""`cleave batch` as a user types it, on a Ray of its own: answers, errors, kills at any point, and going on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.batch_lines import is_success
from app.config import load_config
from app.offline_output import part_path
from tests.conftest import ARTICLES, ROOT, running
from tests.running_cluster import running_cluster
from tests.running_service import write_config
from tests.waiting import wait_until

PROGRAM = str(Path(sys.executable).with_name("cleave"))
QUESTIONS = [json.loads(line)["question"] for line in (ROOT / "examples" / "questions.jsonl").read_text().splitlines()]
TIMEOUT_S = 600


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def asking(custom_id: str, question: str) -> dict[str, Any]:
    body = {"model": "cleave", "messages": [{"role": "user", "content": question}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def command(*arguments: str | Path) -> list[str]:
    return [PROGRAM, "batch", *map(str, arguments)]


def run(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=TIMEOUT_S,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, seed=str(ARTICLES), llm={"engine": "extractive"})


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run; whatever is left of it in the end is killed."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(everything(process))
        process.communicate()


def everything(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def kill(processes: Sequence[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- Wrong use, without Ray ------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_refused_at_once(tmp_path: Path, config: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [{"question": "Why?"}]), tmp_path / "out.jsonl"
    target.write_text("precious")
    ended = run(source, target, "--config", config)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"cleave: {target} is there already. Name another file, or --overwrite it.\n"
    assert target.read_text() == "precious"


def test_an_input_that_is_not_there_is_refused(tmp_path: Path, config: Path) -> None:
    ended = run(tmp_path / "none.jsonl", tmp_path / "out.jsonl", "--config", config)
    assert ended.returncode == 2
    assert "none.jsonl cannot be read (No such file or directory). Name a file of requests." in ended.stderr
    assert not part_path(tmp_path / "out.jsonl").exists()


def test_the_output_cannot_take_the_place_of_the_input(tmp_path: Path, config: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"question": "Why?"}])
    ended = run(source, source, "--overwrite", "--config", config)
    assert ended.returncode == 2
    assert "would take the place of the input" in ended.stderr
    assert read(source) == [{"question": "Why?"}]


def test_an_input_that_can_be_read_but_once_is_refused(tmp_path: Path, config: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    ended = run(pipe, tmp_path / "out.jsonl", "--config", config)
    assert ended.returncode == 2
    assert f"{pipe} is no regular file. Write its content to one first." in ended.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("ray://head:10001/", "is neither HOST:PORT")],
)
def test_a_cluster_that_does_not_answer_is_told_at_once(
    tmp_path: Path, config: Path, address: str, message: str
) -> None:
    source = write(tmp_path / "in.jsonl", [{"question": "Why?"}])
    ended = run(source, tmp_path / "out.jsonl", "--config", config, "--address", address)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_input_without_requests_has_an_output_without_results(tmp_path: Path, config: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [b"", b"  "]), tmp_path / "out.jsonl"
    ended = run(source, target, "--config", config)
    assert ended.returncode == 0, ended.stderr
    assert "holds no request" in ended.stderr
    assert target.read_bytes() == b""


# --- On Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_line_has_a_result_in_its_place(tmp_path: Path, config: Path) -> None:
    lines: list[Any] = [asking(f"q{n}", question) for n, question in enumerate(QUESTIONS)]
    lines += [b"not json", b"", asking("q0", "Again?"), {"question": QUESTIONS[0]}, {"question": "x", "model": "gpt-9"}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    ended = run(source, target, "--config", config, "--json")
    assert ended.returncode == 1, ended.stderr
    summary = json.loads(ended.stdout)
    n = len(QUESTIONS)
    assert (summary["requests"], summary["completed"], summary["failed"]) == (n + 4, n + 1, 3)
    assert summary["resumed_from"] == 0
    assert 0 <= summary["engine"]["full"] <= summary["engine"]["busy"] <= 1
    results = read(target)
    named = [f"q{i}" for i in range(n)]
    assert [one["custom_id"] for one in results] == [*named, None, "q0", f"line-{n + 4}", f"line-{n + 5}"]
    assert [is_success(one) for one in results] == [True] * n + [False, False, True, False]
    assert [one["error"] and one["error"]["code"] for one in results[n : n + 2]] == [
        "invalid_json_line",
        "duplicate_custom_id",
    ]
    assert results[-1]["response"]["body"]["error"]["code"] == "model_not_found"
    assert {path.name for path in tmp_path.glob("out.jsonl*")} == {"out.jsonl"}
    with (
        running(load_config(config).settings) as service,
        httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client,
    ):
        for one, line in zip(results, lines[:n], strict=False):
            online = client.post("/v1/chat/completions", json=line["body"]).json()
            offline = one["response"]["body"]
            assert offline["choices"][0]["message"]["content"] == online["choices"][0]["message"]["content"]
            assert offline["rag"]["sources"] == online["rag"]["sources"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_kill_at_any_point_loses_no_line_and_doubles_none(tmp_path: Path, config: Path) -> None:
    """Killed are the command, the program that it runs, then all. What is left ends by itself, and the run goes on."""
    chance = random.Random(6)
    lines = [asking(f"q{n}", QUESTIONS[n % len(QUESTIONS)]) for n in range(600)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for killed in (slice(0, 1), slice(1, 2), slice(None)):
        wanted = num_lines(part_path(target)) + chance.randrange(1, 120)
        with started(source, target, "--config", config) as process:
            wait_until(lambda wanted=wanted: num_lines(part_path(target)) >= wanted, TIMEOUT_S)  # type: ignore[misc]
            processes = everything(process)
            kill(processes[killed])
            psutil.wait_procs(processes, timeout=60)
            assert not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert not target.exists()
    ended = run(source, target, "--config", config, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["resumed_from"] > 0
    assert [one["custom_id"] for one in read(target)] == [line["custom_id"] for line in lines]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ctrl_c_stops_in_order_and_the_next_run_goes_on(tmp_path: Path, config: Path) -> None:
    lines = [asking(f"q{n}", QUESTIONS[n % len(QUESTIONS)]) for n in range(2_000)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with started(source, target, "--config", config) as process:
        wait_until(lambda: num_lines(part_path(target)) > 0, TIMEOUT_S)
        processes = everything(process)
        second = run(source, target, "--config", config)
        assert second.returncode == 2
        assert "Another `cleave batch` writes" in second.stderr
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130
        assert f"of {len(lines)}. Run the same again to go on." in errors
        psutil.wait_procs(processes, timeout=30)
        assert not [one for one in processes if one.is_running()]
    other = write_config(tmp_path, seed=str(ARTICLES), llm={"engine": "extractive"}, retrieval={"top_k": 4})
    refused = run(source, target, "--config", other)
    assert refused.returncode == 2
    assert "was begun with another settings.retrieval.top_k." in refused.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_documents_that_a_service_holds_are_left_to_it(tmp_path: Path, config: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"question": "Why?"}])
    with running(load_config(config).settings):
        ended = run(source, tmp_path / "out.jsonl", "--config", config)
    assert ended.returncode == 2
    assert "The documents are open in another process, such as the service" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_cluster_answers_also_where_its_head_offers_no_cpus(tmp_path: Path, config: Path) -> None:
    lines = [asking(f"q{n}", question) for n, question in enumerate(QUESTIONS)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with running_cluster({"num_cpus": 2}) as cluster:
        there = ("--address", cluster.address)
        wrong = write_config(tmp_path / "gpu", seed=str(ARTICLES), llm={"engine": "extractive", "device": "gpu"})
        refused = run(source, target, "--config", wrong, *there, environment=cluster.environment)
        assert refused.returncode == 2
        assert "llm.device is gpu, and no node has one" in refused.stderr
        ended = run(source, target, "--config", config, *there, environment=cluster.environment)
    assert ended.returncode == 0, ended.stderr
    assert [one["custom_id"] for one in read(target)] == [line["custom_id"] for line in lines]
    assert all(map(is_success, read(target)))
