"""The arithmetic of GPU memory: parameters as transformers counts them, published sizes, and advice that holds."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from app.config import load_config
from app.doctor import Finding, check_fit
from app.errors import ConfigurationError, InvalidRequest
from app.models import BUNDLED_CHAT_MODELS, read_model_config, resolve_chat_model
from app.settings import LLMSettings, Settings
from app.sizing import (
    GIB,
    GPUS,
    MIB,
    Load,
    activation_bytes,
    advise,
    fit,
    kv_bytes_per_token,
    parse_gpu,
    read_load,
    read_model,
    read_quantization,
    weight_bytes,
)
from tests.model_configs import AWQ, BILLIONS, CONFIGS, FP8, SERVED

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SHIPPED = ("gpu_small", "gpu_large", "twin_llama")
ONE = Load(max_model_len=4096, max_num_seqs=1)

each_model = pytest.mark.parametrize("name", CONFIGS)


def quantised(name: str, how: dict[str, Any]) -> float:
    """The weights of a quantised checkpoint in GB, as the hub states the size of files."""
    return weight_bytes(read_model(CONFIGS[name] | {"quantization_config": how}), ONE) / 1e9


# --- Parameters ------------------------------------------------------------------------------------------------------


@each_model
def test_parameters_are_those_that_the_hub_states(name: str) -> None:
    assert read_model(CONFIGS[name]).num_parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


FAMILIES = "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3Text Phi3 SmolLM3 Mixtral Qwen3Moe".split()


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=8)
def test_parameters_are_those_that_transformers_builds(family: str, data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    head_dim = data.draw(st.sampled_from([8, 16]))
    layers = data.draw(st.integers(1, 4))
    # Where head_dim follows from the hidden size, it must; else it may be anything.
    follows = family in ("Phi3", "Qwen2")
    fields: dict[str, Any] = {
        "vocab_size": data.draw(st.integers(16, 64)),
        "hidden_size": kv_heads * group * (head_dim if follows else data.draw(st.sampled_from([8, 24]))),
        "intermediate_size": data.draw(st.integers(8, 48)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": data.draw(st.booleans()),
        "pad_token_id": 0,
        **({} if follows else {"head_dim": head_dim}),
    }
    if family in ("Llama", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "SmolLM3", "Qwen3Moe"):
        fields["attention_bias"] = data.draw(st.booleans())
    if family in ("Llama", "SmolLM3"):
        fields["mlp_bias"] = data.draw(st.booleans())
    if family == "Mixtral":
        fields |= {"num_local_experts": data.draw(st.integers(2, 4)), "num_experts_per_tok": 2}
    if family == "Qwen3Moe":
        fields |= {
            "num_experts": data.draw(st.integers(2, 4)),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": data.draw(st.integers(8, 24)),
            "decoder_sparse_step": data.draw(st.integers(1, 2)),
            "mlp_only_layers": data.draw(st.sampled_from([[], [0]])),
        }
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # What save_pretrained would write as config.json.
    config.architectures = [type(model).__name__]
    written = json.loads(config.to_json_string(use_diff=True))
    assert read_model(written).num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_the_bundled_model_is_sized_from_its_own_config(tmp_path: Path) -> None:
    [name] = BUNDLED_CHAT_MODELS
    assert read_model_config(name, data_dir=tmp_path) is None
    prepared = Path(resolve_chat_model(name, data_dir=tmp_path).source)
    config = read_model_config(name, data_dir=tmp_path)
    assert config is not None
    model = read_model(config)
    assert model.num_parameters == 134_515_008
    assert weight_bytes(model, ONE) == pytest.approx((prepared / "model.safetensors").stat().st_size, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "its architecture is DeepseekV3ForCausalLM; known are Llama"),
        ({"architectures": None}, "its architecture is not named"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "its quantisation is aqlm"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "names no bits or no group_size"),
    ],
)
def test_what_is_not_known_is_said_and_never_guessed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        fit(read_model(CONFIGS["Llama-3.1-8B"] | changes), ONE, parse_gpu("L4"))
    assert caught.value.message.startswith("cannot be told from config.json: ")
    assert said in caught.value.message


def test_a_stretched_context_window_is_the_models_own() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    qwen = CONFIGS["Qwen3-8B"] | {"max_position_embeddings": 40_960, "rope_scaling": scaling}
    assert read_model(qwen).context == 131_072
    assert read_model(CONFIGS["Llama-3.1-8B"]).context == 131_072


# --- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("Llama-3.1-8B", 16.06), ("Qwen2.5-7B", 15.23), ("Qwen3-4B", 8.04), ("Mixtral-8x7B", 93.4)]
)
def test_16_bit_weights_take_what_their_files_take(name: str, gigabytes: float) -> None:
    assert weight_bytes(read_model(CONFIGS[name]), ONE) / 1e9 == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "how", "gigabytes"),
    [
        ("Qwen3-8B", AWQ, 6.10),
        ("Qwen2.5-7B", AWQ, 5.57),
        ("Llama-3.1-8B", AWQ, 5.74),
        ("Qwen2.5-7B", {"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": False}, 5.58),
        ("Qwen3-30B-A3B", FP8, 31.2),
        (
            "Llama-3.1-8B",
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": None}}},
                "ignore": ["lm_head"],
            },
            9.08,
        ),
    ],
)
def test_quantised_weights_take_what_their_files_take(name: str, how: dict[str, Any], gigabytes: float) -> None:
    assert quantised(name, how) == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize(
    ("kept", "share"),
    [
        (["lm_head", "model.layers.0.input_layernorm", "model.layers.3.mlp.gate", "re:.*mlp.gate$"], 0),
        (["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"], 1 / 32),
        (["self_attn"], 1),
    ],
)
def test_what_a_checkpoint_leaves_in_16_bits_is_counted_so(kept: list[str], share: float) -> None:
    model = read_model(CONFIGS["Llama-3.1-8B"])
    more = quantised("Llama-3.1-8B", AWQ | {"modules_to_not_convert": kept}) - quantised("Llama-3.1-8B", AWQ)
    assert more == pytest.approx(share * model.num_attention_weights * (16 - 4.15625) / 8 / 1e9, abs=1e-6)


def test_vllm_quantises_linear_layers_while_it_loads() -> None:
    llama = read_model(CONFIGS["Llama-3.1-8B"])
    assert weight_bytes(llama, replace(ONE, quantization="fp8_per_tensor")) / 1e9 == pytest.approx(9.08, rel=0.001)
    dense_only = replace(ONE, quantization="int8_per_channel_weight_only")
    assert weight_bytes(llama, dense_only) == weight_bytes(llama, ONE)
    with pytest.raises(ConfigurationError, match="'awq' is no method that vLLM applies"):
        read_quantization(llama, "awq")


@pytest.mark.parametrize("asked", [{"quantization": "bitsandbytes"}, {}])
def test_bitsandbytes_is_sized_and_refused(asked: dict[str, str]) -> None:
    how = {} if asked else {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    model = read_model(CONFIGS["Llama-3.1-8B"] | how)
    found = fit(model, replace(ONE, **asked), parse_gpu("L4"))
    assert found.weight_bytes / 1e9 == pytest.approx(6.03, rel=0.01)
    assert "vLLM 0.32 has no bitsandbytes" in found.problem
    assert not found.starts


def test_a_method_asked_for_on_top_of_a_quantised_checkpoint_is_refused() -> None:
    model = read_model(SERVED["Qwen/Qwen2.5-7B-Instruct-AWQ"])
    assert "quantised already" in fit(model, replace(ONE, quantization="fp8_per_tensor"), parse_gpu("L4")).problem
    assert not fit(model, replace(ONE, quantization="awq_marlin"), parse_gpu("L4")).problem


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("Llama-3.1-8B", 131_072), ("Qwen3-30B-A3B", 98_304), ("Qwen2.5-7B", 57_344), ("Llama-2-7B", 524_288)],
)
def test_a_token_takes_its_keys_and_values(name: str, num_bytes: int) -> None:
    model = read_model(CONFIGS[name])
    assert kv_bytes_per_token(model, ONE) == num_bytes
    assert kv_bytes_per_token(model, replace(ONE, kv_bits=8)) == num_bytes // 2


def test_overhead_is_not_below_what_vllm_has_logged() -> None:
    """ "PyTorch activation peak memory takes 1.26GiB": Meta-Llama-3-8B, 8,192 tokens, 256 sequences (vLLM, #10511)."""
    logged = replace(ONE, batched_tokens=8192, max_num_seqs=256)
    assert 1.26 * GIB < activation_bytes(read_model(CONFIGS["Llama-3.1-8B"]), logged) < 2 * GIB


# --- GPUs and loads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "memory_bytes"),
    [
        ("L4", 23_034 * MIB),
        ("l4", 23_034 * MIB),
        ("NVIDIA GeForce RTX 4090", 24_564 * MIB),
        ("rtx4090", 24_564 * MIB),
        ("a100_80gb", 81_920 * MIB),
        ("24GiB", 24 * GIB),
        ("24 gb", 24 * 10**9),
        ("16384MiB", 16 * GIB),
        ("22.5GiB", int(22.5 * GIB)),
    ],
)
def test_a_gpu_is_a_name_or_a_size(text: str, memory_bytes: int) -> None:
    assert parse_gpu(text).memory_bytes == memory_bytes


@pytest.mark.parametrize("text", ["", "L400", "24", "24G", "-3GiB", "0GiB", "1e9GiB"])
def test_what_is_no_gpu_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(InvalidRequest, match="24GiB, or one of T4, "):
        parse_gpu(text)


@pytest.mark.parametrize(
    ("name", "logged_gib"),
    [("T4", 14.56), ("A10G", 22.07), ("RTX 4090", 23.52), ("A100-80GB", 79.14), ("H100", 79.19), ("RTX 5090", 31.37)],
)
def test_cuda_hands_out_no_less_than_is_assumed(name: str, logged_gib: float) -> None:
    """`total_gpu_memory` in logs of vLLM."""
    assert parse_gpu(name).usable_bytes / GIB <= logged_gib <= parse_gpu(name).memory_bytes / GIB


def test_the_engine_options_decide_last() -> None:
    model = read_model(CONFIGS["Llama-3.1-8B"])
    options = {
        "max_model_len": 1024,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "kv_cache_dtype": "fp8",
        "enforce_eager": True,
    }
    load = read_load(LLMSettings(max_model_len=4096, max_num_seqs=7, engine_options=options), model)
    assert load == Load(1024, 7, utilization=0.5, tensor_parallel_size=2, kv_bits=8, is_eager=True)
    assert read_load(LLMSettings(), model).max_model_len == model.context


@pytest.mark.parametrize(
    "options",
    [
        {"cpu_offload_gb": 4},
        {"max_model_len": "auto"},
        {"gpu_memory_utilization": 90},
        {"kv_cache_dtype": "nvfp4"},
        {"tensor_parallel_size": 3},
    ],
)
def test_options_that_are_not_counted_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        read_load(LLMSettings(engine_options=options), read_model(CONFIGS["Llama-3.1-8B"]))


def test_two_gpus_share_weights_and_cache() -> None:
    model = read_model(CONFIGS["Llama-3.1-70B"])
    one = fit(model, ONE, parse_gpu("H200"))
    two = fit(model, replace(ONE, tensor_parallel_size=2), parse_gpu("H200"))
    assert two.weight_bytes == pytest.approx(one.weight_bytes / 2, rel=0.001)
    assert two.kv_bytes == one.kv_bytes / 2
    # KV heads are not split further than one for each GPU.
    assert fit(model, replace(ONE, tensor_parallel_size=16), parse_gpu("H200")).kv_bytes == one.kv_bytes / 8


def test_a_share_that_leaves_nothing_for_cuda_is_a_problem() -> None:
    model = read_model(CONFIGS["Qwen3-0.6B"])
    assert "lower it" in fit(model, replace(ONE, utilization=0.99), parse_gpu("T4")).problem
    assert not fit(model, ONE, parse_gpu("T4")).problem


# --- Advice ----------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    gpu=st.sampled_from(sorted(GPUS)),
    length=st.integers(256, 262_144),
    sequences=st.integers(1, 512),
    quantization=st.sampled_from([None, "fp8_per_tensor", "mxfp4"]),
    is_checkpoint_quantised=st.booleans(),
)
@settings(max_examples=300)
def test_advice_that_is_followed_fits(
    name: str, gpu: str, length: int, sequences: int, quantization: str | None, is_checkpoint_quantised: bool
) -> None:
    checkpoint = {"quantization_config": AWQ} if is_checkpoint_quantised else {}
    model = read_model(CONFIGS[name] | checkpoint)
    load = Load(length, sequences, None if is_checkpoint_quantised else quantization)
    before = fit(model, load, parse_gpu(gpu))
    if before.fits:
        assert before.starts
        assert before.num_full_sequences >= sequences
        return
    advice = advise(model, load, parse_gpu(gpu))
    for one in advice:
        assert fit(model, one.load, one.gpu).fits
        assert one.load.max_model_len <= length
        assert 1 <= one.load.max_num_seqs <= sequences


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "max_model_len: "),
        ({"max_model_len": 131_072, "max_num_seqs": 64}, "max_model_len: 8192 with max_num_seqs: "),
        ({"max_num_seqs": 8, "max_model_len": 8192}, "engine_options.quantization: fp8_per_tensor"),
        ({"max_num_seqs": 8, "max_model_len": 8192}, "a larger GPU: RTX 5090"),
    ],
)
def test_advice_names_what_to_change(changes: dict[str, int], said: str) -> None:
    load = replace(Load(max_model_len=4096, max_num_seqs=12), **changes)
    advice = [one.text for one in advise(read_model(CONFIGS["Llama-3.1-8B"]), load, parse_gpu("RTX 4090"))]
    assert any(said in one for one in advice), advice


def test_a_model_larger_than_every_gpu_is_spread() -> None:
    load = Load(131_072, 3, quantization="fp8_per_tensor", utilization=0.5)
    advice = [one.text for one in advise(read_model(CONFIGS["Llama-3.1-70B"]), load, parse_gpu("24GiB"))]
    assert advice == []
    advice = [one.text for one in advise(read_model(CONFIGS["Llama-3.1-70B"]), load, parse_gpu("H200"))]
    assert advice == ["engine_options.tensor_parallel_size: 4, with as many GPUs"]


# --- The doctor ------------------------------------------------------------------------------------------------------


def examined(name: str, gpu: str, folder: Path, **options: Any) -> Finding:
    """What the doctor says of a file in deploy/, with the model's config.json at hand."""
    loaded = load_config(DEPLOY / f"{name}.yaml").settings
    path = folder / "config.json"
    path.write_text(json.dumps(SERVED[loaded.llm.model_on("gpu")]), encoding="utf-8")
    return check_fit(loaded.model_copy(update={"llm": loaded.llm.model_copy(update=options)}), parse_gpu(gpu), path)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *(("gpu_small", gpu) for gpu in ("L4", "A10G", "RTX 3090", "RTX 4090", "24GiB")),
        *(("gpu_large", gpu) for gpu in ("H100", "A100-80GB")),
        *(("twin_llama", gpu) for gpu in ("L4", "A10G", "RTX 3090", "RTX 4090")),
    ],
)
def test_the_shipped_configs_fit_their_gpus(name: str, gpu: str, tmp_path: Path) -> None:
    found = examined(name, gpu, tmp_path)
    assert (found.status, found.fix) == ("ok", "")
    assert found.numbers["fits"]
    assert "worst case" in found.detail


@pytest.mark.parametrize(("name", "gpu"), [("gpu_small", "T4"), ("gpu_large", "L40S"), ("twin_llama", "T4")])
def test_the_shipped_configs_do_not_fit_a_smaller_gpu_and_say_what_to_do(name: str, gpu: str, tmp_path: Path) -> None:
    found = examined(name, gpu, tmp_path)
    assert found.status == "warning"
    assert "the worst case does not fit" in found.detail
    assert not found.numbers["fits"]
    # What is advised is the most that fits.
    sequences = int(found.fix.partition("max_num_seqs: ")[2].partition(";")[0])
    assert examined(name, gpu, tmp_path, max_num_seqs=sequences).status == "ok"
    assert examined(name, gpu, tmp_path, max_num_seqs=sequences + 1).status == "warning"
    assert "a larger GPU: " in found.fix


def test_what_vllm_would_not_start_is_a_failure(tmp_path: Path) -> None:
    found = examined("gpu_small", "6GiB", tmp_path)
    assert (found.status, "does not fit" in found.detail) == ("failed", True)
    refused = examined("twin_llama", "L4", tmp_path, engine_options={"quantization": "bitsandbytes"})
    assert (refused.status, "does not start: vLLM 0.32" in refused.detail) == ("failed", True)
    assert "fp8_per_tensor" in refused.fix


def test_a_folder_is_read_directly_and_an_unknown_model_is_a_warning(tmp_path: Path) -> None:
    settings = Settings(llm=LLMSettings(model=str(tmp_path), max_model_len=4096))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen3-0.6B"]), encoding="utf-8")
    assert check_fit(settings, parse_gpu("L4")).status == "ok"
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}', encoding="utf-8")
    found = check_fit(settings, parse_gpu("L4"))
    assert (found.status, "cannot be told from config.json" in found.detail) == ("warning", True)
    assert found.fix


def test_without_a_gpu_the_doctor_says_how_to_ask() -> None:
    found = check_fit(Settings(), None)
    assert (found.status, "--gpu L4" in found.detail) == ("ok", True)


def test_a_bundled_model_needs_no_sizing(tmp_path: Path) -> None:
    [name] = BUNDLED_CHAT_MODELS
    assert check_fit(Settings(data_dir=tmp_path, llm=LLMSettings(model=name)), parse_gpu("T4")).status == "ok"


def doctor(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the verb without a hub, in a process of its own: the hub's client reads its environment once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [sys.executable, "-c", "from app.cli import main; main()", "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_verb_prints_the_numbers_and_the_way_out_without_a_hub(tmp_path: Path) -> None:
    asked = ("--config", "deploy/gpu_small.yaml", "--gpu", "L4", "--json")
    offline = {one["name"]: one for one in json.loads(doctor(*asked, folder=tmp_path).stdout)}["GPU memory"]
    assert (offline["status"], "--model-config FILE" in offline["fix"]) == ("warning", True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SERVED["Qwen/Qwen2.5-7B-Instruct-AWQ"]), encoding="utf-8")
    printed = json.loads(doctor(*asked, "--model-config", str(path), folder=tmp_path).stdout)
    found = {one["name"]: one for one in printed}["GPU memory"]
    assert found["numbers"]["kv_bytes_per_token"] == 57_344
    assert found["numbers"]["gpu"]["name"] == "L4"
    assert not any("numbers" in one for one in printed if one["name"] != "GPU memory")


class Hub(BaseHTTPRequestHandler):
    """Gives the config.json of one revision of one model, and nothing else."""

    def do_GET(self) -> None:
        is_known = self.path == "/Qwen/Qwen3-8B/resolve/v1/config.json"
        body = json.dumps(CONFIGS["Qwen3-8B"]).encode() if is_known else b""
        self.send_response(200 if is_known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_hub_is_asked_for_the_config_of_a_revision_and_nothing_is_kept(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from app.models import read_model_config as read"
    code += "\nfor name in sys.argv[1:]: print(read(name, data_dir=Path('data'))['hidden_size'])"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {"PATH": "", "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
        command = [sys.executable, "-c", code, "Qwen/Qwen3-8B@v1", "Qwen/Qwen3-8B"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        server.shutdown()
    assert done.stdout == "4096\n"
    assert "the config.json of 'Qwen/Qwen3-8B' is not in the local cache" in done.stderr
    assert not list(tmp_path.rglob("config.json"))


def test_the_verb_refuses_an_unknown_gpu(tmp_path: Path) -> None:
    refused = doctor("--gpu", "GTX 1", folder=tmp_path)
    assert refused.returncode == 2
    assert "is not known" in refused.stderr


def test_the_page_on_models_shows_what_the_doctor_says(tmp_path: Path) -> None:
    assert examined("gpu_small", "L4", tmp_path).detail in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


# --- Files in deploy/ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [DEPLOY / f"{name}.yaml" for name in SHIPPED], ids=lambda path: path.name)
def test_the_scaling_of_a_shipped_config_follows_its_engine(path: Path) -> None:
    loaded = load_config(path)
    [llm] = [entry for entry in loaded.deployments if entry["name"] == "LLM"]
    sequences, most = loaded.settings.llm.max_num_seqs, llm["max_ongoing_requests"]
    assert 1.5 * sequences <= most <= 2 * sequences
    assert 0.5 * most <= llm["autoscaling_config"]["target_ongoing_requests"] <= 0.75 * most
    assert llm["ray_actor_options"]["num_gpus"] == 1
    assert loaded.settings.llm.device == "gpu"
    template = loaded.settings.llm.chat_template
    assert template is None or (ROOT / template).is_file()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rendered(tokenizer: Any, *messages: tuple[str, str], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=(DEPLOY / "alpaca.jinja").read_text(encoding="utf-8"),
        tokenize=False,
        **{"add_generation_prompt": True, **options},
    )
    return text


PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def test_alpacas_template_renders_one_question(tokenizer: Any) -> None:
    expected = f"<s>{PREAMBLE}### Instruction:\nWhat is RAG?\n\n### Response:\n"
    assert rendered(tokenizer, ("user", "What is RAG?")) == expected


def test_alpacas_template_renders_a_conversation(tokenizer: Any) -> None:
    text = rendered(tokenizer, ("system", "Be brief. "), ("user", "A?"), ("assistant", "B."), ("user", "C?"))
    assert text == (
        f"<s>{PREAMBLE}Be brief.\n\n### Instruction:\nA?\n\n### Response:\nB.</s>\n\n"
        "### Instruction:\nC?\n\n### Response:\n"
    )


def test_alpacas_template_does_not_ask_for_a_response_unasked(tokenizer: Any) -> None:
    assert rendered(tokenizer, ("user", "A?"), add_generation_prompt=False).endswith("### Instruction:\nA?")


def test_alpacas_template_needs_no_special_tokens(tokenizer: Any) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert rendered(bare, ("user", "A?")).startswith("Below is")
