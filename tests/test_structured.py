"""JSON out of vLLM: what the schema says comes out, and no schema takes the engine down."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from jsonschema import validate

from app.domain import GenerationRequest, JSONFormat, Message, SamplingParams
from app.errors import InvalidRequest
from app.llm import LLM
from app.services import build_llm
from app.settings import LLMSettings, Settings
from tests.schemas import ENDLESS, UNSUPPORTED, WELL_FORMED
from tests.tiny_models import make_spelling_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(900)]
ACCEPTED_BY_US_ALONE = {
    "an integer of 31 digits": {"type": "integer", "minimum": -(10**30)},
    "a range without numbers": {"type": "integer", "minimum": 5, "maximum": 1},
    "a property that cannot be": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "an enum without values": {"enum": []},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LLM]:
    model = make_spelling_model(tmp_path_factory.mktemp("spelling") / "model")
    found = await build_llm(Settings(llm=LLMSettings(model=str(model), max_num_seqs=4)), "cpu")
    yield found
    await found.close()


def asking(schema: Any = None, **sampling: Any) -> GenerationRequest:
    wanted = SamplingParams(**({"max_tokens": 64, "json": JSONFormat(schema and json.dumps(schema))} | sampling))
    return GenerationRequest("r", (Message("user", "How long did it last?"),), wanted)


async def answer(llm: LLM, request: GenerationRequest) -> tuple[str, str | None]:
    deltas = [delta async for delta in llm.generate(request)]
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


@pytest.mark.parametrize("name", [name for name in WELL_FORMED if name != "recursive"])
async def test_json_is_what_the_schema_describes(llm: LLM, name: str) -> None:
    text, reason = await answer(llm, asking(WELL_FORMED[name]))
    assert reason == "stop"
    validate(json.loads(text), WELL_FORMED[name])


async def test_any_object_is_one(llm: LLM) -> None:
    text, _ = await answer(llm, asking())
    assert isinstance(json.loads(text), dict)


async def test_a_recursive_schema_ends_with_the_tokens_at_the_latest(llm: LLM) -> None:
    text, reason = await answer(llm, asking(WELL_FORMED["recursive"]))
    assert text.startswith('{"children":')
    assert reason in ("stop", "length")


@pytest.mark.parametrize("schema", [*ENDLESS.values(), *UNSUPPORTED.values(), *ACCEPTED_BY_US_ALONE.values()])
async def test_a_schema_that_cannot_be_followed_is_refused_and_the_engine_lives(llm: LLM, schema: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await answer(llm, asking(schema))
    assert caught.value.param in ("response_format", "response_format.json_schema.schema")
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")
    assert (await llm.info()).num_running == 0
    text, _ = await answer(llm, asking(WELL_FORMED["object"]))
    assert json.loads(text) == {"system": "", "minutes": 0}


async def test_biases_change_the_words_and_unknown_tokens_are_refused(llm: LLM) -> None:
    text, _ = await answer(llm, asking(json=None, max_tokens=3))
    assert text == '"""'
    text, _ = await answer(llm, asking(json=None, max_tokens=3, logit_bias={2: -100.0}))
    assert '"' not in text
    with pytest.raises(InvalidRequest) as caught:
        await answer(llm, asking(json=None, logit_bias={1_000_000: 1.0}))
    assert caught.value.param == "logit_bias"
