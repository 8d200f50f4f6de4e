"""Webhooks: a real receiver that refuses at first, and the official client that checks what it is sent."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from app import batch_worker, batches, webhooks
from app.batch_lines import ENDPOINT
from app.batches import WEBHOOK, BatchStore
from app.errors import ConfigurationError
from app.launcher import serve
from app.settings import BatchSettings
from app.webhooks import SECRET_VARIABLE, Webhooks, read_secret
from tests.conftest import running, sample_settings
from tests.test_batch_store import Folder, many
from tests.waiting import wait_until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PATIENCE_S = 60.0


class Receiver(http.server.ThreadingHTTPServer):
    """Answers each request with the next of its statuses, then always with 200."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = list(statuses)
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/ended"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((dict(self.headers.items()), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    with Receiver(*statuses) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_worker, "TOLD_EVERY_S", 0.05)
    monkeypatch.setattr(webhooks, "MIN_RETRY_S", 0.05)


def test_the_end_of_a_batch_is_told_until_it_is_heard_also_after_a_restart(tmp_path: Path, hurry: None) -> None:
    with receiving(500, 302) as receiver:
        batch = BatchSettings(webhook_url=receiver.url, webhook_secret=SECRET)
        settings = sample_settings(tmp_path, seed=None, batch=batch)
        with running(settings) as service:
            client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", webhook_secret=SECRET)
            sent = client.files.create(file=("a.jsonl", b"{"), purpose="batch")
            begun = client.batches.create(input_file_id=sent.id, endpoint=ENDPOINT, completion_window="24h")
            wait_until(lambda: receiver.received, PATIENCE_S)
        told = tmp_path / "batches" / begun.id / WEBHOOK
        assert told.exists()
        with running(settings):
            wait_until(lambda: not told.exists(), PATIENCE_S)
    assert len(receiver.received) == 3
    for headers, body in receiver.received:
        event = client.webhooks.unwrap(body, headers)
        assert event.type == "batch.failed"
        assert event.data.id == begun.id
        assert event.id == json.loads(body)["id"] == headers["webhook-id"]
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    headers, body = receiver.received[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body + b" ", headers)


async def test_a_batch_that_took_days_is_told_for_days_from_its_end(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    begun = folder.batches.create(
        folder.send(many(1)).id,
        endpoint=ENDPOINT,
        completion_window="30d",
        window_s=30 * 86400,
        key_id=None,
        base_url="",
        metadata=None,
        has_webhook=True,
    )
    told = folder.of(begun) / WEBHOOK
    with receiving(*[500] * 10) as receiver:
        settings = BatchSettings(webhook_url=receiver.url, webhook_secret=SECRET)
        await Webhooks(settings).send_due(folder.batches)
        assert not receiver.received  # It has not ended.
        old = replace(folder.batches.prepare(begun.id), created_at=time.time() - 10 * 86400)
        batches._write_state(folder.of(begun), old)
        done = folder.work_off(old)
        await Webhooks(settings).send_due(folder.batches)
        await Webhooks(settings).send_due(folder.batches)  # Not due yet.
        assert (len(receiver.received), told.exists()) == (1, True)
        batches._write_state(folder.of(begun), replace(done, completed_at=time.time() - 4 * 86400))
        told.write_text(json.dumps({**json.loads(told.read_text()), "next_at": 0}))
        await Webhooks(settings).send_due(folder.batches)
        assert (len(receiver.received), told.exists()) == (2, False)


async def test_a_receiver_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    with receiving() as receiver:
        url = receiver.url
    folder = Folder(tmp_path)
    store = BatchStore(tmp_path, folder.files)
    begun = store.create(
        "file-" + "0" * 24,
        endpoint=ENDPOINT,
        completion_window="1h",
        window_s=3600,
        key_id=None,
        base_url="",
        metadata=None,
        has_webhook=True,
    )
    assert store.prepare(begun.id).status == "failed"
    await Webhooks(BatchSettings(webhook_url=url, webhook_secret=SECRET)).send_due(store)
    assert json.loads((folder.of(begun) / WEBHOOK).read_text())["num_attempts"] == 1


@pytest.mark.parametrize("secret", [None, "", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64", "whsec_é" * 20])
def test_a_secret_that_is_none_is_refused_at_the_start_in_one_line(
    secret: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    settings = {"url": "http://localhost/ended", **({} if secret is None else {"secret": secret})}
    config = tmp_path / "serve_config.yaml"
    args = {"data_dir": str(tmp_path), "batch": {f"webhook_{name}": value for name, value in settings.items()}}
    application = {"name": "cleave", "import_path": "deployments.application:three_tier", "args": args}
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    assert serve(config) == 2
    said = capsys.readouterr().err
    assert "batch.webhook_secret must be whsec_" in said
    assert said.count("\n") == 1


def test_the_secret_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    assert read_secret(BatchSettings(webhook_url="https://example.org/ended"))
    assert read_secret(BatchSettings()) is None
    for url in ("https://", "http:///x"):
        with pytest.raises(ConfigurationError, match=r"batch\.webhook_url"):
            read_secret(BatchSettings.model_construct(webhook_url=url, webhook_secret=None))
