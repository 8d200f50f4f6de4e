"""Reranking: a cross-encoder reads the question with each of the best passages and orders them anew."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.acceleration import native_dtype
from app.domain import Passage
from app.errors import ConfigurationError
from app.models import resolve_reranker
from app.settings import RerankingSettings
from app.telemetry import logger

SKIPPED = "reranking_skipped"
"""What a result says that had to do without."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A passage to read for a question. Whoever no longer waits for the score has cancelled it."""

    question: str
    passage: Passage
    score: asyncio.Future[float]


class Reranker:
    """A loaded cross-encoder. Searches that run at the same time share its forward passes.

    `turn` is held during a pass. The encoder holds the same one: both compute on the same cores, so each would only
    make the other late, and the lock lets them in by turns.
    """

    def __init__(self, settings: RerankingSettings, turn: asyncio.Lock) -> None:
        self._model = _load(settings)
        self._window: float = self._model.max_seq_length or math.inf
        self._batch_size = settings.batch_size
        self._timeout_s = settings.timeout_s
        self._turn = turn
        self._waiting: deque[_Pair] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._pair_s = 0.0
        """Seconds that a pair took of late, the wait for the encoder included."""
        self._pass_end = 0.0
        """When the forward pass that is being computed will probably end, by the clock of `time.perf_counter`."""
        self.num_candidates = settings.num_candidates

    async def rerank(
        self, question: str, passages: Sequence[Passage], *, timeout_s: float = math.inf
    ) -> tuple[list[Passage], tuple[str, ...]]:
        """Put the best passage first, within the budgets of candidates and of time.

        The first `num_candidates` are ordered by the model's score; the rest follows in its order, with scores below
        theirs. Late or failed, the passages stay as they are. Also gives what the result had to do without.
        """
        candidates, rest = passages[: self.num_candidates], passages[self.num_candidates :]
        if len(candidates) < 2:
            return list(passages), ()
        timeout_s = min(timeout_s, self._timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                scores = await self._scores(question, candidates, timeout_s)
        except TimeoutError as error:
            logger.warning("reranking skipped", extra={"why": str(error) or f"not done within {timeout_s:g} s"})
            return list(passages), (SKIPPED,)
        except Exception:
            logger.exception("reranking skipped")
            return list(passages), (SKIPPED,)
        scored = [replace(passage, score=score) for passage, score in zip(candidates, scores, strict=True)]
        scored.sort(key=lambda passage: -passage.score)
        below = scored[-1].score - rest[0].score - 1 if rest else 0.0
        return [*scored, *(replace(passage, score=passage.score + below) for passage in rest)], ()

    async def _scores(self, question: str, passages: Sequence[Passage], timeout_s: float) -> list[float]:
        is_idle = self._worker is None or self._worker.done()
        if not is_idle and self._expected_s(len(passages)) > timeout_s:
            # More than can be done in time would make each other late, until hardly any was served.
            raise TimeoutError(f"other searches come first, and {timeout_s:g} s would not be enough")
        new_score = asyncio.get_running_loop().create_future
        pairs = [_Pair(question, passage, new_score()) for passage in passages]
        # Texts of like length share a batch, which spares padding.
        self._waiting.extend(sorted(pairs, key=lambda pair: len(pair.passage.text)))
        if is_idle:
            self._worker = asyncio.create_task(self._work())
        # When the time is up or the caller leaves, this cancels the scores that are still to come.
        return await asyncio.gather(*(pair.score for pair in pairs))

    def _expected_s(self, num_pairs: int) -> float:
        """Estimate the seconds until so many pairs more are read, in passes that those who come later fill up."""
        num_pairs += sum(not pair.score.done() for pair in self._waiting)
        num_read = math.ceil(num_pairs / self._batch_size) * self._batch_size
        return max(0.0, self._pass_end - time.perf_counter()) + num_read * self._pair_s

    async def _work(self) -> None:
        """Compute until nobody waits. A task of its own: the batch of one who leaves is also that of others."""
        while self._waiting:
            started = time.perf_counter()
            async with self._turn:
                if batch := self._next_batch():
                    self._pass_end = time.perf_counter() + len(batch) * self._pair_s
                    await self._compute(batch)
                    latest_s = (time.perf_counter() - started) / len(batch)
                    self._pair_s = (self._pair_s + latest_s) / 2 if self._pair_s else latest_s

    def _next_batch(self) -> list[_Pair]:
        """Take those who have waited longest, and pass over those who no longer wait."""
        batch: list[_Pair] = []
        while self._waiting and len(batch) < self._batch_size:
            pair = self._waiting.popleft()
            if not pair.score.done():
                batch.append(pair)
        return batch

    async def _compute(self, batch: Sequence[_Pair]) -> None:
        try:
            scores = await asyncio.to_thread(self._predict, [(pair.question, pair.passage) for pair in batch])
        except Exception as error:
            for pair in batch:
                if not pair.score.done():
                    pair.score.set_exception(error)
            return
        for pair, score in zip(batch, scores, strict=True):
            if not pair.score.done():
                pair.score.set_result(score)

    def _predict(self, pairs: Sequence[tuple[str, Passage]]) -> list[float]:
        texts = [(question, self._text(question, passage)) for question, passage in pairs]
        scores: list[float] = _predict(self._model, texts).tolist()
        if not all(map(math.isfinite, scores)):
            raise ValueError("The cross-encoder gave a score that is no number.")
        return scores

    def _text(self, question: str, passage: Passage) -> str:
        """Put the title in front, but not where it would push the end of the passage out of the window."""
        if not passage.title:
            return passage.text
        titled = f"{passage.title}\n{passage.text}"
        num_tokens = len(self._model.tokenizer(question, titled, truncation=False, verbose=False)["input_ids"])
        return titled if num_tokens <= self._window else passage.text


def _load(settings: RerankingSettings) -> Any:
    """Load the model of `reranking.model` and try it out: what goes wrong now would go wrong in every search."""
    # Heavy: only the process that reranks pays for it.
    from sentence_transformers import CrossEncoder

    found = resolve_reranker(settings.model or "")
    try:
        model = CrossEncoder(
            found.source,
            revision=found.revision,
            device="cpu",
            model_kwargs={"dtype": native_dtype() if settings.dtype == "auto" else settings.dtype},
        )
        # Longer than most windows: some tokenizers do not know theirs.
        shape = _predict(model, [("question", "text " * 600)]).shape
    except Exception as error:
        # Whatever it was (a damaged file, an unknown architecture, code that is not trusted), the remedy is one.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"reranking.model: {settings.model} cannot be used as a cross-encoder ({reason}). Name another, or none."
        ) from error
    architecture = next(iter(getattr(model.config, "architectures", None) or ()), "")
    if len(model) == 1 and architecture and not architecture.endswith("ForSequenceClassification"):
        # Loaded all the same, with a last layer of chance.
        raise ConfigurationError(
            f"reranking.model: {settings.model} is no cross-encoder but a {architecture}. Name a model that "
            "was trained to score a question with a passage, such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    if shape != (1,):
        raise ConfigurationError(
            f"reranking.model: {settings.model} gives {shape[-1]} scores for a pair, which is no order. Name a model "
            "with one output, such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    return model


def _predict(model: Any, pairs: list[tuple[str, str]]) -> Any:
    """Score pairs of question and text in one forward pass, to an array of shape (len(pairs),)."""
    from torch.nn import Identity

    # Without the sigmoid that some models end in: it keeps the order, but makes the best ones equal.
    return model.predict(pairs, batch_size=len(pairs), activation_fn=Identity(), show_progress_bar=False)
