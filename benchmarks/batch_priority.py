"""How much a running batch slows those down who wait: time to the first word online, with and without one, in turns.

    python -m benchmarks.batch_priority --url http://127.0.0.1:8000 [--rounds 3] [--questions 12]

Needs a running service with its sample articles. Turns with and without a batch alternate, so that both meet the same
machine. Prints medians, 95th percentiles and their ratio.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

QUESTIONS = Path(__file__).parent.parent / "examples" / "questions.jsonl"
NUM_LINES = 500
"""Of a batch: more than are answered meanwhile."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=12, help="asked one after the other, in each turn")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two questions")
    options = parser.parse_args()
    questions = [one["question"] for one in map(json.loads, QUESTIONS.read_text("utf-8").splitlines()) if one["answer"]]
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=0, timeout=120)
    alone: list[float] = []
    beside: list[float] = []
    num_done = 0
    for round_number in range(options.rounds):
        asked = [questions[(round_number * options.questions + n) % len(questions)] for n in range(options.questions)]
        alone += [first_word_s(client, one, options.pause, f"{round_number}a") for one in asked]
        with running_batch(client, questions, f"{round_number}") as num_answered:
            beside += [first_word_s(client, one, options.pause, f"{round_number}b") for one in asked]
            num_done += num_answered()
    for name, found in (("alone", alone), ("beside a batch", beside)):
        print(f"{name:15} median {statistics.median(found):.2f} s   p95 {p95(found):.2f} s   of {len(found)}")
    print(
        f"ratio           median {statistics.median(beside) / statistics.median(alone):.2f}     p95 "
        f"{p95(beside) / p95(alone):.2f}     the batches answered {num_done} requests meanwhile"
    )


def first_word_s(client: openai.OpenAI, question: str, pause_s: float, salt: str) -> float:
    """Ask, and time until the first piece of the answer."""
    time.sleep(pause_s)
    # Not the same prompt again, of which the engine would know the beginning.
    messages = [{"role": "user", "content": f"{question} ({salt})"}]
    started = time.perf_counter()
    first = None
    for chunk in client.chat.completions.create(model="cleave", messages=messages, stream=True):  # type: ignore[call-overload]
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - started
    assert first is not None
    return first


@contextmanager
def running_batch(client: openai.OpenAI, questions: list[str], salt: str) -> Iterator[object]:
    """Keep a batch running that does not end before the block does; give what counts its answers."""
    lines = [
        {
            "custom_id": f"{n}",
            "body": {"messages": [{"role": "user", "content": f"{questions[n % len(questions)]} [{salt}-{n}]"}]},
        }
        for n in range(2000)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("load.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    def num_answered() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts.completed + counts.failed if counts else 0

    while num_answered() < 2:
        time.sleep(0.2)
    try:
        yield num_answered
    finally:
        client.batches.cancel(batch.id)
        while client.batches.retrieve(batch.id).status != "cancelled":
            time.sleep(0.2)


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


if __name__ == "__main__":
    main()
