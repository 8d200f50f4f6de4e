"""Batches over HTTP, with the official client: files in, answers out, by the code that answers online."""

import json
from typing import Any

import openai
import pytest

from tests.waiting import wait_until

QUESTIONS = [
    "How long did the Reading Room outage last?",
    "Who won the 1998 football World Cup?",
    "What share of conversations does the Reading Room canary receive, and for how long?",
]


def line(custom_id: str, body: Any = None, **changes: Any) -> dict[str, Any]:
    body = body or {"model": "cleave", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


def asking(question: str, **options: Any) -> dict[str, Any]:
    return {"model": "cleave", "messages": [{"role": "user", "content": question}], **options}


def write_lines(lines: list[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


@pytest.fixture
def client(live_service: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_service}/v1", api_key="none", max_retries=0, timeout=60)


def run(client: openai.OpenAI, content: bytes) -> openai.types.Batch:
    sent = client.files.create(file=("requests.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "test"}
    )
    assert batch.status == "validating"

    def has_ended() -> bool:
        nonlocal batch
        batch = client.batches.retrieve(batch.id)
        return batch.status in ("completed", "failed", "expired", "cancelled")

    wait_until(has_ended, 60)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def test_every_request_is_answered_as_online(client: openai.OpenAI) -> None:
    batch = run(client, write_lines([line(f"q{n}", asking(question)) for n, question in enumerate(QUESTIONS)]))
    assert batch.status == "completed"
    assert batch.metadata == {"run": "test"}
    assert batch.request_counts
    assert batch.request_counts.model_dump() == {"completed": 3, "failed": 0, "total": 3}
    assert batch.error_file_id is None
    results = read(client, batch.output_file_id)
    assert [one["custom_id"] for one in results] == ["q0", "q1", "q2"]
    for one, question in zip(results, QUESTIONS, strict=True):
        online = client.chat.completions.create(**asking(question)).model_dump()
        answered = one["response"]["body"]
        assert one["response"]["status_code"] == 200
        assert answered["choices"][0]["message"]["content"] == online["choices"][0]["message"]["content"]
        assert answered["choices"][0]["message"]["annotations"] == online["choices"][0]["message"]["annotations"]
        assert answered["rag"]["sources"] == online["rag"]["sources"]
