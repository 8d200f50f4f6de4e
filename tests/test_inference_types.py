"""The three types of inference, with the bundled model on Serve and Ray Data: the same answers to the same requests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import ARTICLES, ROOT
from tests.running_service import running, write_config
from tests.waiting import wait_until

ENDPOINT = "/v1/chat/completions"
QUESTIONS = [json.loads(line)["question"] for line in (ROOT / "examples" / "questions.jsonl").read_text().splitlines()]
NUM_QUESTIONS = 8
TIMEOUT_S = 600


def asking(number: int, question: str) -> dict[str, Any]:
    body = {"model": "cleave", "messages": [{"role": "user", "content": question}], "temperature": 0}
    return {"custom_id": f"q{number}", "method": "POST", "url": ENDPOINT, "body": body}


def read(content: str) -> dict[str, Any]:
    """Give the body that each request was answered with."""
    return {one["custom_id"]: one["response"]["body"] for one in map(json.loads, content.splitlines())}


def ask_as_a_batch(client: openai.OpenAI, content: bytes) -> str:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", TIMEOUT_S)
    output_file_id = client.batches.retrieve(batch.id).output_file_id
    assert output_file_id is not None
    return client.files.content(output_file_id).text


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_online_asynchronous_and_offline_answers_are_the_same(tmp_path: Path) -> None:
    """In float32: in bfloat16 what an engine computes depends a little on what it computes beside, online too."""
    config = write_config(
        tmp_path,
        seed=str(ARTICLES),
        llm={"device": "cpu", "max_model_len": 4096, "engine_options": {"dtype": "float32"}},
        # On a busy machine no answer is to become a quote because it is late.
        answer={"timeout_s": TIMEOUT_S, "first_token_timeout_s": TIMEOUT_S},
    )
    lines = [asking(number, question) for number, question in enumerate(QUESTIONS[:NUM_QUESTIONS])]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with running(config) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        online: dict[str, Any] = {
            line["custom_id"]: client.post("/chat/completions", body=line["body"], cast_to=object) for line in lines
        }
        asynchronous = read(ask_as_a_batch(client, content))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    ended = subprocess.run(
        [Path(sys.executable).with_name("cleave"), "batch", source, target, "--config", config, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    engine = json.loads(ended.stdout)["engine"]
    assert engine["completion_tokens"] > 0
    assert engine["busy"] > 0
    offline = read(target.read_text("utf-8"))
    assert list(asynchronous) == list(offline) == list(online)
    for custom_id, expected in online.items():
        for found in (asynchronous[custom_id], offline[custom_id]):
            assert found["choices"][0]["message"] == expected["choices"][0]["message"]
            assert found["rag"]["sources"] == expected["rag"]["sources"]
