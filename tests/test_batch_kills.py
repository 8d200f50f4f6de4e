"""Batches of which the workers are killed all the time: each request has one answer in the end, none is lost."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from app.batches import RESULTS
from tests.conftest import ROOT
from tests.test_batch_store import ENDPOINT, Folder, lines
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_WORKERS = 3
NUM_KILLS = 8
COUNTS = (250, 90, 1)
SEED = 20_260
PATIENCE_S = 120.0


class Killed:
    """Workers over one folder, and what they have written down."""

    def __init__(self, folder: Folder, log: Path) -> None:
        self.folder = folder
        self.log = log
        self._command = [sys.executable, "-m", "tests.batch_service", str(folder.path), str(log)]
        self.workers = [self._start() for _ in range(NUM_WORKERS)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, stderr=subprocess.DEVNULL)

    def kill(self, which: int) -> None:
        """Kill one with SIGKILL, and start another in its place."""
        self.workers[which].kill()
        self.workers[which].wait()
        self.workers[which] = self._start()

    def stop(self) -> None:
        for one in self.workers:
            one.kill()
            one.wait()

    def num_asked(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def results(self) -> dict[str, str]:
        """Give the ids of the results that are written down, by batch and request; a result twice is an error."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.path.glob(f"batches/*/parts/*/{RESULTS}")):
            with contextlib.suppress(FileNotFoundError):  # Its batch has just ended.
                for one in path.read_bytes().split(b"\n")[:-1]:
                    result = json.loads(one)["result"]
                    name = f"{path.parent.parent.parent.name} {result['custom_id']}"
                    assert name not in found, name
                    found[name] = result["id"]
        for batch in self.folder.batches.recent(after=None):
            if batch.output_file_id is not None:
                for one in self.folder.files.content(batch.output_file_id).read_bytes().splitlines():
                    result = json.loads(one)
                    assert found.setdefault(f"{batch.id} {result['custom_id']}", result["id"]) == result["id"]
        return found


def test_workers_that_are_killed_all_the_time_lose_no_request_and_answer_none_twice(tmp_path: Path) -> None:
    folder, chance = Folder(tmp_path / "data"), random.Random(SEED)
    begun = []
    for number, count in enumerate(COUNTS):
        names = [f"{number}-{n}" for n in range(count)]
        bodies = [{"model": "noting", "messages": [{"role": "user", "content": name}]} for name in names]
        requests = [
            {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}
            for name, body in zip(names, bodies, strict=True)
        ]
        begun.append(folder.begin(lines(*requests)))
    killed = Killed(folder, tmp_path / "log.txt")
    written: dict[str, str] = {}
    try:
        for _ in range(NUM_KILLS):
            # Not by the clock: each has begun something when one of them goes.
            target = killed.num_asked() + chance.randrange(1, 60)
            wait_until(
                lambda target=target: killed.num_asked() >= target or not list(folder.batches.unfinished()), PATIENCE_S
            )
            time.sleep(chance.random() * 0.05)
            killed.kill(chance.randrange(NUM_WORKERS))
            now = killed.results()
            assert written.items() <= now.items()  # What is written down stays.
            written = now
        wait_until(lambda: not list(folder.batches.unfinished()), PATIENCE_S)
    finally:
        killed.stop()
    for number, (batch, count) in enumerate(zip(begun, COUNTS, strict=True)):
        done = folder.batches.read(batch.id)
        assert (done.status, done.num_completed, done.num_failed) == ("completed", count, 0)
        assert folder.read(done.output_file_id) == [f"{number}-{n}" for n in range(count)]
    results = killed.results()
    assert written.items() <= results.items()
    assert len(results) == sum(COUNTS)
    asked = Counter(one.split()[1] for one in killed.log.read_text().splitlines())
    # Asked again was only what a killed worker had at hand: so many requests of one part each.
    num_again = sum(asked.values()) - len(asked)
    print(f"{NUM_KILLS} kills: {len(asked)} requests, {num_again} of them asked again")  # noqa: T201  # With -s.
    assert len(asked) == sum(COUNTS)
    assert num_again <= NUM_KILLS * 3
