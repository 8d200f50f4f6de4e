"""Requests that nobody waits for make way for the others, and lose nothing by it."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.domain import GenerationRequest, Message, SamplingParams
from app.llm import LLM
from app.llm.background import Priorities
from app.services import build_llm
from app.settings import LLMSettings, Settings
from tests.running_service import share_prepared_models

STORY = (Message("user", "Write a story about a lighthouse keeper and her dog."),)


async def holds(condition: asyncio.Task[object]) -> bool:
    """Let everything run that can; tell whether this has ended."""
    for _ in range(20):
        await asyncio.sleep(0)
    return condition.done()


async def test_background_waits_for_the_foreground_and_is_told_to_make_way() -> None:
    priorities = Priorities(max_background=2, is_exclusive=True)
    async with AsyncExitStack() as stack:
        make_way = await stack.enter_async_context(priorities.background())
        assert not make_way.is_set()
        with priorities.foreground(), priorities.foreground():
            assert make_way.is_set()
            second = asyncio.create_task(stack.enter_async_context(priorities.background()))
            assert not await holds(second)
        assert await holds(second)
        assert not second.result().is_set()


async def test_only_so_many_run_in_the_background() -> None:
    priorities = Priorities(max_background=1, is_exclusive=True)
    async with AsyncExitStack() as waiting:
        async with priorities.background():
            second = asyncio.create_task(waiting.enter_async_context(priorities.background()))
            assert not await holds(second)
        assert await holds(second)


async def test_where_there_is_room_for_both_nobody_makes_way() -> None:
    priorities = Priorities(max_background=1, is_exclusive=False)
    with priorities.foreground():
        async with priorities.background() as make_way:
            assert not make_way.is_set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_an_answer_that_made_way_again_and_again_is_the_same(tmp_path: Path) -> None:
    """In float32: in bfloat16 a token that is read again may differ from when it was made, by a rounding."""
    share_prepared_models(tmp_path)
    options = {"dtype": "float32"}
    settings = Settings(data_dir=tmp_path, llm=LLMSettings(max_num_seqs=4, stream_interval=2, engine_options=options))
    llm = await build_llm(settings, "cpu")
    try:
        alone = await text_of(llm, "alone", is_background=True)
        story = asyncio.create_task(text_of(llm, "beside", is_background=True))
        num_asked = 0
        while not story.done():
            await text_of(llm, f"question-{num_asked}", max_tokens=4)
            num_asked += 1
            await asyncio.sleep(0.3)
        assert await story == alone
        assert num_asked > 2
    finally:
        await llm.close()


async def text_of(llm: LLM, request_id: str, *, max_tokens: int = 60, is_background: bool = False) -> tuple[str, int]:
    """The text, and how many tokens the engine says it has."""
    request = GenerationRequest(request_id, STORY, SamplingParams(max_tokens=max_tokens), is_background=is_background)
    text, num_tokens = "", 0
    async for delta in llm.generate(request):
        text += delta.text
        num_tokens = delta.completion_tokens
    return text, num_tokens
