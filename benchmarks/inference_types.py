"""The same requests in the three types of inference: are answers and sources equal, and how long does each take?

    python -m benchmarks.inference_types DIR [--limit 50] [--dtype float32] [--json OUT]

DIR is a set as `cleave eval` reads it. The first of its questions are asked at temperature 0, by a service of their own
over the set's documents, with the bundled model: online one after the other, then as one batch. Then the service stops,
and `cleave batch` answers them once more. What differs from the first answers is counted and, with `--json`, kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai

from tests.running_service import running, write_config

PROGRAM = Path(sys.executable).with_name("cleave")
ENDPOINT = "/v1/chat/completions"
TIMEOUT_S = 600.0
"""Nothing is to be late: what is has quotes for an answer, online."""
Answer = Mapping[str, Any]


def main() -> None:
    """Ask, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="a folder with corpus.jsonl and queries.jsonl")
    parser.add_argument("--limit", type=int, default=50, help="questions")
    parser.add_argument("--dtype", default="auto", help="of the language model, as vLLM takes it")
    parser.add_argument("--json", type=Path, help="where to write figures and differences")
    options = parser.parse_args()
    questions = [json.loads(line)["text"] for line in (options.set / "queries.jsonl").read_text("utf-8").splitlines()]
    lines = [_line(number, question) for number, question in enumerate(questions[: options.limit])]
    with tempfile.TemporaryDirectory(prefix="cleave-benchmark-") as folder:
        config = write_config(
            Path(folder),
            seed=str((options.set / "corpus.jsonl").resolve()),
            llm={"device": "cpu", "engine_options": {"dtype": options.dtype}},
            answer={"timeout_s": TIMEOUT_S, "first_token_timeout_s": TIMEOUT_S},
        )
        with running(config) as service:
            client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
            online, online_s = _ask_online(client, lines)
            asynchronous, asynchronous_s = _ask_asynchronously(client, lines)
        offline, summary = _ask_offline(Path(folder), config, lines)
    found = {
        "requests": len(lines),
        "dtype": options.dtype,
        "seconds": {"online": online_s, "asynchronous": asynchronous_s, "offline": summary["seconds"]},
        "offline_engine": summary["engine"],
        "differences": {"asynchronous": _differences(online, asynchronous), "offline": _differences(online, offline)},
    }
    _print(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _line(number: int, question: str) -> dict[str, Any]:
    body = {"model": "cleave", "messages": [{"role": "user", "content": question}], "temperature": 0}
    return {"custom_id": f"q{number}", "method": "POST", "url": ENDPOINT, "body": body}


def _ask_online(client: openai.OpenAI, lines: Sequence[Mapping[str, Any]]) -> tuple[list[Answer], float]:
    """Ask one after the other; give the answers and the seconds that they took together."""
    client.post("/chat/completions", body=lines[0]["body"], cast_to=object)  # The first of all is slower.
    started = time.perf_counter()
    answers: list[Answer] = [client.post("/chat/completions", body=one["body"], cast_to=object) for one in lines]  # type: ignore[misc]
    return answers, time.perf_counter() - started


def _ask_asynchronously(client: openai.OpenAI, lines: Sequence[Mapping[str, Any]]) -> tuple[list[Answer], float]:
    """Ask by a batch; the seconds are those until its output could be read."""
    started = time.perf_counter()
    file = client.files.create(file=("requests.jsonl", _content(lines)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    while batch.status not in ("completed", "failed"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch
    content = client.files.content(batch.output_file_id).text
    return _answers(content), time.perf_counter() - started


def _ask_offline(folder: Path, config: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[list[Answer], dict[str, Any]]:
    """Ask by `cleave batch`; give the answers and its summary."""
    source, target = folder / "requests.jsonl", folder / "answers.jsonl"
    source.write_bytes(_content(lines))
    ended = subprocess.run(
        [PROGRAM, "batch", source, target, "--config", config, "--json"], stdout=subprocess.PIPE, check=True
    )
    return _answers(target.read_text("utf-8")), json.loads(ended.stdout)


def _content(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _answers(content: str) -> list[Answer]:
    """Read an output; both write the answers in the order of the requests."""
    return [json.loads(line)["response"]["body"] for line in content.splitlines()]


def _differences(expected: Sequence[Answer], found: Sequence[Answer]) -> list[dict[str, Any]]:
    """Give what is not the same, answer by answer."""
    differences = []
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        texts = [answer["choices"][0]["message"]["content"] for answer in (one, other)]
        has_same_sources = one["rag"]["sources"] == other["rag"]["sources"]
        if texts[0] != texts[1] or not has_same_sources:
            differences.append({"request": f"q{number}", "answers": texts, "has_same_sources": has_same_sources})
    return differences


def _print(found: Mapping[str, Any]) -> None:
    online_s, engine = found["seconds"]["online"], found["offline_engine"]
    for name, seconds in found["seconds"].items():
        differences = found["differences"].get(name, [])
        num_sources = sum(not one["has_same_sources"] for one in differences)
        print(f"{name:13} {seconds:7.1f} s, {online_s / seconds:5.2f} times as fast as online; of {found['requests']}")
        print(f"{'':13} {len(differences)} differ in their answers or sources, {num_sources} in their sources")
    print(f"offline, from when its engine was ready: {online_s / engine['seconds']:.2f} times as fast as online")
    print(f"{'':13} engine busy {engine['busy']:.0%}, full {engine['full']:.0%}")


if __name__ == "__main__":
    main()
