"""The queue of batches on real Ray Serve, with files and with a real Redis, while replicas are killed."""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.running_service import RunningService, free_port, running, write_config
from tests.system_setup import find_redis
from tests.test_batches import asking, client_of, line, read, write_lines
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

NUM_LINES = 1_000
"""Of the batch under which everything is killed: more than are answered until then."""
BATCHES = "ServeReplica:cleave:Batches"
KILLED = (BATCHES, "ServeReplica:cleave:Ingress", "ServeReplica:cleave:Retriever", "ServeReplica:cleave:LLM", BATCHES)
PATIENCE_S = 480.0
ENDS = ("completed", "failed", "expired", "cancelled")


class Redis:
    """A server of its own, which can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = find_redis()
        assert program
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(params=["files", "redis"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Redis | None]:
    if request.param == "files":
        yield None
        return
    if find_redis() is None:
        pytest.skip("no Redis: run `python -m tests.system_setup` as root")
    redis = Redis(tmp_path)
    redis.start()
    yield redis
    redis.stop()


def begin(client: openai.OpenAI, count: int) -> openai.types.Batch:
    lines = [line(f"q{n}", asking(f"What is said of {n}?")) for n in range(count)]
    sent = client.files.create(file=("requests.jsonl", write_lines(lines)), purpose="batch")
    return client.batches.create(input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h")


def num_answered(client: openai.OpenAI, batch: openai.types.Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts.completed + counts.failed if counts else 0


def check_end(client: openai.OpenAI, batch: openai.types.Batch, count: int) -> None:
    """Wait until it has ended, and see that each request has its one answer, in order."""
    wait_until(lambda: client.batches.retrieve(batch.id).status in ENDS, PATIENCE_S)
    done = client.batches.retrieve(batch.id)
    assert (done.status, done.error_file_id) == ("completed", None)
    assert [one["custom_id"] for one in read(client, done.output_file_id)] == [f"q{n}" for n in range(count)]


def processes(service: RunningService, name: str) -> list[psutil.Process]:
    """Find those of one of Ray's actors."""
    found = []
    for one in service.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(one.cmdline()):
                found.append(one)
    return found


def written(folder: Path) -> dict[str, list[Any]]:
    """Give the ids of the results that are written down of each request."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("batches/*/parts/*/results.jsonl")):
        for one in path.read_bytes().split(b"\n")[:-1]:
            result = json.loads(one)["result"]
            found.setdefault(result["custom_id"], []).append(result["id"])
    return found


def test_batches_outlive_every_part_and_their_queue(tmp_path: Path, broker: Redis | None) -> None:
    batch_settings = {} if broker is None else {"batch": {"broker_url": broker.url}}
    config = write_config(tmp_path, llm={"engine": "extractive"}, seed=None, **batch_settings)
    data = tmp_path / "data"
    with running(config) as service:
        # While a part is away, its requests are not answered.
        client = client_of(service.url).with_options(max_retries=10)
        batch = begin(client, NUM_LINES)
        num_before = 0
        for name in KILLED:
            # Some more are answered after each kill, so what was killed is there again when the next one goes.
            wait_until(lambda least=num_before + 10: len(written(data)) >= least, PATIENCE_S)
            before = written(data)
            num_before = len(before)
            killed = processes(service, name)
            for one in killed:
                one.send_signal(signal.SIGKILL)
            psutil.wait_procs(killed, timeout=60)
            assert killed, name
        check_end(client, batch, NUM_LINES)
        # What was written down stays, and is not asked again.
        after = {
            one["custom_id"]: [one["id"]] for one in read(client, client.batches.retrieve(batch.id).output_file_id)
        }
        assert {name: after[name] for name in before} == before

        # Nothing takes entries while there is no replica; then the queue loses all of them.
        for one in processes(service, BATCHES):
            one.send_signal(signal.SIGKILL)
        lost = begin(client, 3)
        if broker is None:
            for entry in (data / "queue" / "entries").iterdir():
                entry.unlink(missing_ok=True)
        else:
            broker.stop()  # It keeps nothing on disk.
            # What is begun without the queue is taken, and found later.
            later = begin(client, 3)
            broker.start()
            check_end(client, later, 3)
        check_end(client, lost, 3)
