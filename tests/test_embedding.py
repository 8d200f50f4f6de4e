"""The encoder on real models: the bundled one, and tiny ones of other architectures that the test makes."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, FNetConfig, MPNetConfig, PreTrainedConfig, Qwen3Config

from app.acceleration import accelerate, native_dtype
from app.embedding import Embedder, Vectors
from app.ingestion import manifest
from app.models import resolve_encoder
from app.settings import ChunkingSettings, EmbeddingSettings
from tests.tiny_models import make_random_encoder

TEXTS = ["A table", "stays in one piece , and its heading with it . " * 9, "?", "", "How long may a section be ?"]
SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 80}
BERT = BertConfig(**SIZE, **HEADS)
PROMPTS = {"query": "query : ", "passage": "passage : "}


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an encoder that has prompts of its own."""
    return str(make_random_encoder(tmp_path_factory.mktemp("prompted"), BERT, pooling="cls", prompts=PROMPTS))


def reference(model: str, texts: list[str], prompt: str = "") -> Vectors:
    """What sentence-transformers computes by itself, in 32 bits and as unit vectors."""
    loaded = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": "float32"})
    vectors: Vectors = loaded.encode(texts, prompt=prompt, normalize_embeddings=True)
    return vectors


def lowest_cosine(vectors: Vectors, others: Vectors) -> float:
    return float((vectors * others).sum(axis=1).min())


def is_accelerated(embedder: Embedder) -> bool:
    return "forward" in vars(embedder._model.transformers_model)


# --- The same vectors as sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_bundled_model_is_accelerated_and_gives_the_vectors_of_sentence_transformers(dtype: str) -> None:
    settings = EmbeddingSettings.model_validate({"dtype": dtype})
    embedder = Embedder(settings)
    texts = ["A table stays in one piece.", "Outage", "word " * 400, "How long did the outage last?", ""]
    expected = reference(resolve_encoder(settings.model).source, texts)
    assert is_accelerated(embedder)
    assert (embedder.query_prefix, embedder.document_prefix) == ("", "")
    assert lowest_cosine(await embedder.embed_documents(texts), expected) > 0.999
    assert lowest_cosine(await embedder.embed_queries(texts), expected) > 0.999


@pytest.mark.parametrize(
    ("transformer", "pooling"),
    [
        (BERT, "cls"),
        (MPNetConfig(**SIZE, **HEADS), "mean"),
        (Qwen3Config(**SIZE, **HEADS, num_key_value_heads=1, head_dim=16), "lasttoken"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
async def test_other_architectures_and_poolings_are_accelerated_too(
    transformer: PreTrainedConfig, pooling: str, tmp_path: Path
) -> None:
    model = str(make_random_encoder(tmp_path, transformer, pooling=pooling))
    embedder = Embedder(EmbeddingSettings(model=model, dtype="float32"))
    assert is_accelerated(embedder)
    assert lowest_cosine(await embedder.embed_documents(TEXTS), reference(model, TEXTS)) > 0.9999


async def test_what_openvino_cannot_run_runs_in_pytorch_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cleave"), "propagate", True)
    model = str(make_random_encoder(tmp_path, FNetConfig(**SIZE, max_position_embeddings=80)))
    embedder = Embedder(EmbeddingSettings(model=model, dtype="float32"))
    assert not is_accelerated(embedder)
    assert [record.getMessage() for record in caplog.records if record.name == "cleave"] == [
        "the encoder runs in PyTorch, since OpenVINO cannot run it"
    ]
    # One by one, since this architecture also reads the padding.
    for text in TEXTS:
        assert lowest_cosine(await embedder.embed_documents([text]), reference(model, [text])) > 0.9999


def test_a_conversion_that_computes_something_else_is_not_used(prompted: str) -> None:
    model = SentenceTransformer(prompted, device="cpu")
    transformer = model.transformers_model
    whole = type(transformer).forward

    class Signed(type(transformer)):  # type: ignore[misc]
        """Depends on the length in plain Python, which a traced model does not."""

        def forward(self, input_ids, attention_mask, **given):  # type: ignore[no-untyped-def]
            output = whole(self, input_ids=input_ids, attention_mask=attention_mask, **given)
            output.last_hidden_state *= -1.0 if int(input_ids.shape[1]) < 10 else 1.0
            return output

    transformer.__class__ = Signed
    before = model.encode(TEXTS)
    assert not accelerate(model, dtype="float32", num_threads=1)
    np.testing.assert_array_equal(model.encode(TEXTS), before)


def test_bfloat16_is_chosen_only_where_the_cpu_computes_in_it() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert native_dtype() == ("bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32")


def test_openvino_has_no_way_to_report_home() -> None:
    assert sys.modules["openvino_telemetry"] is None


# --- Prefixes --------------------------------------------------------------------------------------------------------


async def test_the_prompts_of_the_model_are_its_prefixes_in_vectors_counts_and_manifest(prompted: str) -> None:
    embedder = Embedder(EmbeddingSettings(model=prompted, dtype="float32"))
    assert (embedder.query_prefix, embedder.document_prefix) == ("query : ", "passage : ")
    queries, documents = await embedder.embed_queries(TEXTS), await embedder.embed_documents(TEXTS)
    assert lowest_cosine(queries, reference(prompted, TEXTS, "query : ")) > 0.9999
    assert lowest_cosine(documents, reference(prompted, TEXTS, "passage : ")) > 0.9999
    assert not np.allclose(queries, documents)
    # They count into the window and stand in the manifest.
    assert embedder.num_tokens("one piece") == 4 + 2
    stamp = manifest(embedder, ChunkingSettings())
    assert (stamp["embedding.query_prefix"], stamp["embedding.document_prefix"]) == ("query : ", "passage : ")


async def test_a_setting_replaces_the_prompt_of_the_model(prompted: str) -> None:
    embedder = Embedder(EmbeddingSettings(model=prompted, dtype="float32", query_prefix="", document_prefix="table : "))
    assert lowest_cosine(await embedder.embed_queries(TEXTS), reference(prompted, TEXTS)) > 0.9999
    assert lowest_cosine(await embedder.embed_documents(TEXTS), reference(prompted, TEXTS, "table : ")) > 0.9999
