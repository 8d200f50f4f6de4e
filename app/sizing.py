"""How much GPU memory a model takes, from its config.json alone: weights, KV cache and overhead against one GPU.

Bytes are bytes, GiB are 2**30 of them. A model whose size does not follow from its config.json is refused, never
guessed. Where vLLM decides at run time, the larger value is assumed; numbers of vLLM are those of release 0.32.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from app.errors import ConfigurationError, InvalidRequest
from app.settings import LLMSettings

ModelConfig: TypeAlias = Mapping[str, Any]
"""What a config.json holds."""

MIB, GIB = 2**20, 2**30


# --- GPUs ------------------------------------------------------------------------------------------------------------

GPUS = {
    "T4": 15_360,
    "A10": 23_028,
    "A10G": 23_028,
    "L4": 23_034,
    "RTX 4090": 24_564,
    "RTX 3090": 24_576,
    "RTX 5090": 32_607,
    "A100-40GB": 40_960,
    "A40": 46_068,
    "L40S": 46_068,
    "RTX A6000": 49_140,
    "A100-80GB": 81_920,
    "H100": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}
"""MiB of memory that nvidia-smi reports, with ECC on where the card ships so: less than the 24 or 80 GB of its name."""

DRIVER_SHARE, DRIVER_CAP = 0.03, GIB
"""What CUDA does not hand out of that memory. vLLM's logs (`total_gpu_memory`) show 0.4 GiB less on T4, A10G and
RTX 4090, 0.6 on H200 and 0.9 on A100-80GB: 3%, at most 1 GiB, is above each."""
CONTEXT_BYTES = int(0.4 * GIB)
"""CUDA's own context, which stands outside of what `gpu_memory_utilization` shares out: an estimate."""

SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>MiB|GiB|GB)", re.IGNORECASE)
UNITS = {"mib": MIB, "gib": GIB, "gb": 10**9}
BRAND = re.compile(r"nvidia|geforce|tesla|[\s_-]")


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU by the bytes that nvidia-smi reports."""

    name: str
    memory_bytes: int

    @property
    def usable_bytes(self) -> int:
        """Bytes that CUDA hands out: the memory less the driver's share."""
        return self.memory_bytes - int(min(self.memory_bytes * DRIVER_SHARE, DRIVER_CAP))


def parse_gpu(text: str) -> GPU:
    """Read a name of the table, or a size in GiB, GB (10**9 bytes) or MiB.

    Raises:
        InvalidRequest: it is neither; the message lists the names.
    """
    if size := SIZE.fullmatch(text.strip()):
        memory_bytes = int(float(size["number"]) * UNITS[size["unit"].lower()])
        if memory_bytes >= GIB:
            return GPU(text.strip(), memory_bytes)
    plain = {_plain(name): name for name in GPUS}
    if name := plain.get(_plain(text)):
        return GPU(name, GPUS[name] * MIB)
    raise InvalidRequest(f"--gpu: {text!r} is not known. Name a size such as 24GiB, or one of {', '.join(GPUS)}.")


def _plain(name: str) -> str:
    return BRAND.sub("", name.lower())


# --- Models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """What the layers of an architecture hold, as transformers builds them (modeling_*.py); verified by the tests."""

    biases: str = "optional"
    """`optional`: on query, key, value and output if `attention_bias`; `qkv`: always, not on the output; `none`."""
    norms_per_layer: int = 2
    has_head_norms: bool = False
    is_tied: bool = False
    """Whether input and output embeddings are one where config.json does not say."""
    needs_head_dim: bool = False
    """Whether head_dim does not default to hidden_size / num_attention_heads."""
    has_experts: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(biases="none"),
    "Qwen2ForCausalLM": Family(biases="qkv"),
    "Qwen3ForCausalLM": Family(has_head_norms=True, needs_head_dim=True),
    "GemmaForCausalLM": Family(is_tied=True, needs_head_dim=True),
    "Gemma2ForCausalLM": Family(is_tied=True, needs_head_dim=True, norms_per_layer=4),
    "Gemma3ForCausalLM": Family(is_tied=True, needs_head_dim=True, norms_per_layer=4, has_head_norms=True),
    "Phi3ForCausalLM": Family(biases="none"),
    "SmolLM3ForCausalLM": Family(is_tied=True),
    "MixtralForCausalLM": Family(biases="none", has_experts=True),
    "Qwen3MoeForCausalLM": Family(has_head_norms=True, needs_head_dim=True, has_experts=True),
}


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a model. Everything called `num_..._weights` counts parameters, not bytes."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    """Tokens of the model's own context window."""
    num_attention_weights: int
    """Of the projections of all layers; these are quantised."""
    num_mlp_weights: int
    """Of the feed-forward projections of all dense layers; these are quantised."""
    num_expert_weights: int
    """Of the experts of all layers; these are quantised."""
    num_embedding_weights: int
    """Input embeddings, and the output's where they are not the same; these are not quantised."""
    num_other_weights: int
    """Norms, biases and routers; these are not quantised."""
    mlp_width: int
    """Intermediate values of one token in a feed-forward part: gate, up and their product."""
    quantization: Mapping[str, Any] | None = None

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        quantised = self.num_attention_weights + self.num_mlp_weights + self.num_expert_weights
        return quantised + self.num_embedding_weights + self.num_other_weights


def read_model(config: ModelConfig) -> Model:
    """Count parameters from a config.json.

    Raises:
        ConfigurationError: the architecture is unknown, or a field that it needs is missing.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        known = ", ".join(known.removesuffix("ForCausalLM") for known in FAMILIES)
        raise _unknown(f"its architecture is {name or 'not named'}; known are {known}")
    hidden, layers, vocab = (_count(config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    heads = _count(config, "num_attention_heads")
    # Where it may be left out, each query head has its own.
    kv_heads = _count(config, "num_key_value_heads", heads if name in ("LlamaForCausalLM", "Phi3ForCausalLM") else None)
    head_dim = _count(config, "head_dim", None if family.needs_head_dim else hidden // heads)
    query, kv = heads * head_dim, kv_heads * head_dim
    num_mlp, num_experts, num_routers, mlp_width = _feed_forward(config, family, hidden, layers)
    is_tied = _flag(config, "tie_word_embeddings", family.is_tied)
    return Model(
        architecture=str(name),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context=_context(config),
        num_attention_weights=layers * (2 * hidden * query + 2 * hidden * kv),
        num_mlp_weights=num_mlp,
        num_expert_weights=num_experts,
        num_embedding_weights=vocab * hidden * (1 if is_tied else 2),
        num_other_weights=num_routers
        + hidden
        + layers * hidden * family.norms_per_layer
        + (layers * 2 * head_dim if family.has_head_norms else 0)
        + _num_biases(config, family, layers, query + 2 * kv, hidden),
        mlp_width=mlp_width,
        quantization=_mapping(config, "quantization_config") or _mapping(config, "compression_config") or None,
    )


def _feed_forward(config: ModelConfig, family: Family, hidden: int, layers: int) -> tuple[int, int, int, int]:
    """Count the weights of dense layers, of experts and of routers, and the width of what one token passes through."""
    if not family.has_experts:
        width = _count(config, "intermediate_size")
        return layers * 3 * hidden * width, 0, 0, 3 * width
    # transformers 5 writes both architectures with Mixtral's name of the field.
    experts = _count(config, "num_experts" if "num_experts" in config else "num_local_experts")
    chosen = _count(config, "num_experts_per_tok")
    # Qwen's models may have dense layers between those with experts; all layers of Mixtral have experts.
    dense_only, step = config.get("mlp_only_layers") or [], _count(config, "decoder_sparse_step", 1)
    if not isinstance(dense_only, list):
        raise _unknown("mlp_only_layers is no list")
    num_sparse = sum(layer not in dense_only and (layer + 1) % step == 0 for layer in range(layers))
    width = _count(config, "intermediate_size") if num_sparse < layers else 0
    expert_width = _count(config, "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size")
    # vLLM's fused kernel keeps, per chosen expert, gate and up or the output, whichever is wider, and their product.
    passed = chosen * (max(2 * expert_width, hidden) + expert_width)
    return (
        (layers - num_sparse) * 3 * hidden * width,
        num_sparse * experts * 3 * hidden * expert_width,
        num_sparse * hidden * experts,
        max(3 * width, passed),
    )


def _num_biases(config: ModelConfig, family: Family, layers: int, num_qkv: int, hidden: int) -> int:
    if family.biases == "qkv":
        return layers * num_qkv
    total = 0
    if family.biases == "optional" and _flag(config, "attention_bias", False):
        total += layers * (num_qkv + hidden)
    if family.biases == "optional" and _flag(config, "mlp_bias", False):
        total += layers * (2 * _count(config, "intermediate_size") + hidden)
    return total


def _context(config: ModelConfig) -> int:
    """Tokens of the context window: a yarn model's own is its original one, stretched."""
    length = _count(config, "max_position_embeddings")
    scaling = _mapping(config, "rope_scaling") or _mapping(config, "rope_parameters")
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    is_yarn = "yarn" in (scaling.get("rope_type"), scaling.get("type"))
    if is_yarn and isinstance(factor, int | float) and isinstance(original, int):
        return max(length, int(factor * original))
    return length


def _count(config: ModelConfig, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _unknown(f"{key} is {'missing' if value is None else repr(value)[:40]}")
    return value


def _flag(config: ModelConfig, key: str, default: bool) -> bool:
    value = config.get(key)
    return value if isinstance(value, bool) else default


def _mapping(config: ModelConfig, key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _unknown(reason: str) -> ConfigurationError:
    return ConfigurationError(f"cannot be told from config.json: {reason}")


# --- Quantisation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits per quantised weight, scales and zero points included. Embeddings, norms and routers keep 16."""

    name: str
    bits: float
    is_for_experts_only: bool = False
    kept: tuple[str, ...] = ()
    """Modules that stay at 16 bits, as the checkpoint names them."""
    problem: str = ""
    """Why vLLM refuses it."""


# What vLLM computes while it loads a 16-bit model (vllm/config/quantization.py): bits, and whether of experts only.
ONLINE = {
    "fp8": (8.0, False),
    "fp8_per_tensor": (8.0, False),
    "fp8_per_channel": (8.0, False),
    # A 32-bit scale for each 128 x 128 weights.
    "fp8_per_block": (8.0 + 32 / 128**2, False),
    # An 8-bit scale for each 32 weights, as the OCP microscaling formats define.
    "mxfp8": (8.0 + 8 / 32, False),
    "mxfp4": (4.0 + 8 / 32, False),
    "experts_int8": (8.0, True),
    "int8_per_channel_weight_only": (8.0, True),
    # An 8-bit scale for each 16 weights.
    "nvfp4_per_token": (4.0 + 8 / 16, True),
}
# QLoRA (arXiv 2305.14314), without double quantisation: a 32-bit scale for each 64 weights.
BITSANDBYTES_BITS = 4.0 + 32 / 64
NO_BITSANDBYTES = "vLLM 0.32 has no bitsandbytes: choose fp8_per_tensor, or an AWQ or FP8 checkpoint"


def read_quantization(model: Model, asked: str | None) -> Quantization | None:
    """Tell how weights are stored: as the checkpoint says, or as `llm.engine_options.quantization` asks.

    Raises:
        ConfigurationError: the method, or its group size, is not one whose size is known.
    """
    if model.quantization is not None:
        found = _checkpoint_quantization(model.quantization)
        if asked in ONLINE and not found.name.startswith("fp8"):
            problem = f"the checkpoint is quantised already ({found.name}): remove engine_options.quantization"
            return replace(found, problem=problem)
        return found
    if asked is None:
        return None
    if asked == "bitsandbytes":
        return Quantization(asked, BITSANDBYTES_BITS, problem=NO_BITSANDBYTES)
    if asked not in ONLINE:
        raise _unknown(f"the model is not quantised, and {asked!r} is no method that vLLM applies while it loads")
    bits, is_for_experts_only = ONLINE[asked]
    return Quantization(asked, bits, is_for_experts_only)


KEPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules", "exclude_modules")


def _checkpoint_quantization(config: ModelConfig) -> Quantization:
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    lists = [config.get(key) for key in KEPT_KEYS]
    kept = tuple(str(name) for names in lists if isinstance(names, list) for name in names)
    match method:
        case "awq" | "gptq" if not config.get("dynamic"):
            return Quantization(*_grouped(method, config), kept=kept)
        case "fp8" | "fbgemm_fp8":
            return Quantization(method, _fp8_bits(config), kept=kept)
        case "compressed-tensors":
            return Quantization(method, _compressed_bits(config), kept=kept)
        case "modelopt" if config.get("quant_algo") in ("FP8", "NVFP4"):
            # NVFP4 has an 8-bit scale for each 16 weights.
            return Quantization(method, 8.0 if config["quant_algo"] == "FP8" else 4.0 + 8 / 16, kept=kept)
        case "bitsandbytes":
            bits = BITSANDBYTES_BITS if config.get("load_in_4bit") or config.get("_load_in_4bit") else 8.0
            return Quantization(method, bits, kept=kept, problem=NO_BITSANDBYTES)
    raise _unknown(f"its quantisation is {method or 'not named'}")


def _grouped(method: str, config: ModelConfig) -> tuple[str, float]:
    """AWQ and GPTQ: per group one 16-bit scale, and a zero point that is packed like the weights."""
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size"))
    if not isinstance(bits, int) or not isinstance(group, int) or group == 0:
        raise _unknown("quantization_config names no bits or no group_size")
    if group < 0:  # One group per column.
        return f"{method} {bits} bit", float(bits)
    return f"{method} {bits} bit, groups of {group}", bits + (16 + bits) / group


def _fp8_bits(config: ModelConfig) -> float:
    block = config.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)
    return 8.0 + 32 / (block[0] * block[1]) if is_block and isinstance(block, list) else 8.0


def _compressed_bits(config: ModelConfig) -> float:
    """Of the group with the most bits; each must be for all linear layers, else it is open which ones it leaves out."""
    groups = [group for group in _mapping(config, "config_groups").values() if isinstance(group, Mapping)]
    weights = [_mapping(group, "weights") for group in groups]
    if not weights or not any("Linear" in (group.get("targets") or ()) for group in groups):
        raise _unknown("config_groups of its quantisation do not cover all linear layers")
    most = 0.0
    for one in weights:
        bits, size = one.get("num_bits"), one.get("group_size")
        if not isinstance(bits, int):
            raise _unknown("config_groups of its quantisation name no num_bits")
        most = max(most, bits + (16 + bits) / size if isinstance(size, int) and size > 0 else bits)
    return most


KEPT_ANYWAY = re.compile(r"(lm_head|embed\w*|\w*norm|gate|router|shared_expert_gate)\W*$")
LAYER = re.compile(r"layers\.\d+\.")


def _num_kept_weights(model: Model, names: tuple[str, ...]) -> int:
    """Count weights that a checkpoint leaves at 16 bits, rounded up: part of an attention counts as the whole."""
    parts = {"self_attn": model.num_attention_weights, "mlp": model.num_mlp_weights + model.num_expert_weights}
    kept: dict[str, float] = {}
    for name in names:
        if KEPT_ANYWAY.search(name):
            continue
        known = [part for part in parts if part in name] or list(parts)
        for part in known:
            layer = LAYER.search(name)
            kept[f"{layer[0] if layer else 'all'}{part}"] = parts[part] / (model.num_layers if layer else 1)
    return math.ceil(min(sum(kept.values()), sum(parts.values())))


# --- Load ------------------------------------------------------------------------------------------------------------

UTILIZATION = 0.92
"""vLLM's `gpu_memory_utilization` (vllm/config/cache.py)."""
BATCHED_TOKENS = 2048
"""vLLM's `max_num_batched_tokens` for an `AsyncLLM` (vllm/config/scheduler.py): tokens of one step."""
BLOCK_TOKENS = 16
"""Tokens of one block of the KV cache (vllm/config/cache.py)."""
KV_BITS = {"auto": None, "float16": 16, "bfloat16": 16, "fp8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8}
WEIGHT_BITS = {"auto": 16, "half": 16, "float16": 16, "bfloat16": 16, "float": 32, "float32": 32}
"""By `dtype` of vLLM; its `auto` computes a 32-bit checkpoint in 16 bits (vllm/config/model.py)."""
NOT_COUNTED = (
    "cpu_offload_gb",
    "enable_lora",
    "hf_overrides",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "quantization_config",
    "speculative_config",
)
"""Options that change the arithmetic in ways that are not counted here."""

ACTIVATION_BITS = 16
SAMPLER_BYTES = 24
"""Per sequence and word of the vocabulary: logits, their 32-bit copies, and the sort of top-p with its 64-bit indices.
With the activations below, Llama 3 8B with 8,192 tokens and 256 sequences gives 1.7 GiB; vLLM's log says 1.2 to 1.3."""
GRAPH_BYTES = GIB
"""CUDA graphs. vLLM's logs (`Graph capturing finished ... took`) say 0.1 GiB for 0.5B models to 1.0 for 30B ones."""
WORKSPACE_BYTES = GIB // 2
"""FlashInfer's workspace (394 MiB, vllm/envs.py), cuBLAS, and what the allocator cannot use."""
PARALLEL_BYTES = GIB
"""NCCL and its buffers, per GPU, where a model is spread over several."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine. Lengths are tokens."""

    max_model_len: int
    max_num_seqs: int
    quantization: str | None = None
    weight_bits: int = 16
    kv_bits: int = 16
    utilization: float = UTILIZATION
    tensor_parallel_size: int = 1
    batched_tokens: int = BATCHED_TOKENS
    is_eager: bool = False


def read_load(settings: LLMSettings, model: Model) -> Load:
    """Take what decides about memory from the settings; `engine_options` come last, as they do in the engine.

    Raises:
        ConfigurationError: an option is set whose effect on memory is not counted here.
    """
    options = settings.engine_options
    for key in NOT_COUNTED:
        if options.get(key) not in (None, False, 0, 1):
            raise ConfigurationError(f"cannot be told: llm.engine_options.{key} is not counted")
    dtype = str(options.get("dtype", "auto")).removeprefix("torch.")
    cache_dtype = str(options.get("kv_cache_dtype", "auto"))
    if dtype not in WEIGHT_BITS or cache_dtype not in KV_BITS:
        raise ConfigurationError(f"cannot be told: dtype {dtype} or kv_cache_dtype {cache_dtype} is not counted")
    load = Load(
        max_model_len=_option(options, "max_model_len", settings.max_model_len or model.context),
        max_num_seqs=_option(options, "max_num_seqs", settings.max_num_seqs),
        quantization=options.get("quantization"),
        weight_bits=WEIGHT_BITS[dtype],
        kv_bits=KV_BITS[cache_dtype] or WEIGHT_BITS[dtype],
        utilization=_share(options),
        tensor_parallel_size=_option(options, "tensor_parallel_size", 1),
        batched_tokens=_option(options, "max_num_batched_tokens", BATCHED_TOKENS),
        is_eager=bool(options.get("enforce_eager", False)),
    )
    if model.num_heads % load.tensor_parallel_size:
        raise ConfigurationError(
            f"{model.num_heads} attention heads cannot be spread over tensor_parallel_size "
            f"{load.tensor_parallel_size}: choose a divisor"
        )
    return load


def _option(options: Mapping[str, Any], key: str, default: int) -> int:
    value = options.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"cannot be told: llm.engine_options.{key} is {value!r}, not a positive number")
    return value


def _share(options: Mapping[str, Any]) -> float:
    value = options.get("gpu_memory_utilization", UTILIZATION)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigurationError("llm.engine_options.gpu_memory_utilization must be above 0 and at most 1")
    return float(value)


# --- Fit -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """The arithmetic for one GPU, all in bytes of that GPU; with tensor parallelism each holds its share."""

    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    """Of one sequence of `max_model_len` tokens."""
    kv_bytes: int
    """Of `max_num_seqs` such sequences at once: the worst case."""
    budget_bytes: int
    """What vLLM may use: usable memory times `gpu_memory_utilization`."""
    problem: str = ""
    """Why the engine refuses to start, apart from memory."""

    @property
    def overhead_bytes(self) -> int:
        """Activations, CUDA graphs and workspaces."""
        return self.activation_bytes + self.graph_bytes + self.workspace_bytes

    @property
    def needed_bytes(self) -> int:
        """All of it, in the worst case."""
        return self.weight_bytes + self.overhead_bytes + self.kv_bytes

    @property
    def free_bytes(self) -> int:
        """What is left for the KV cache; vLLM takes all of it."""
        return max(0, self.budget_bytes - self.weight_bytes - self.overhead_bytes)

    @property
    def num_full_sequences(self) -> int:
        """How many sequences of full length fit at once."""
        return self.free_bytes // self.kv_bytes_per_sequence

    @property
    def starts(self) -> bool:
        """Whether vLLM starts: it asks for room for one sequence of full length."""
        return not self.problem and self.num_full_sequences >= 1

    @property
    def fits(self) -> bool:
        """Whether the worst case fits too, so that no sequence ever waits for memory."""
        return not self.problem and self.needed_bytes <= self.budget_bytes


def weight_bytes(model: Model, load: Load) -> int:
    """Bytes of all weights: parameters times bits, the quantised ones with their scales."""
    quantization = read_quantization(model, load.quantization)
    attention_mlp, experts = model.num_attention_weights + model.num_mlp_weights, model.num_expert_weights
    total = attention_mlp + experts
    num_quantised = 0
    if quantization is not None:
        num_quantised = experts if quantization.is_for_experts_only else total
        num_quantised = max(0, num_quantised - _num_kept_weights(model, quantization.kept))
    bits = num_quantised * (quantization.bits if quantization else 0.0)
    return math.ceil((bits + (model.num_parameters - num_quantised) * load.weight_bits) / 8)


def kv_bytes_per_token(model: Model, load: Load) -> int:
    """Bytes of one token: 2 (key and value) x layers x KV heads x head_dim x bytes of the cache's type.

    Sliding windows count as full attention: vLLM may free what leaves the window, and need not.
    """
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * load.kv_bits // 8


def activation_bytes(model: Model, load: Load) -> int:
    """Bytes at the peak of one step: the widest part of a layer for each token, and the sampler for each sequence."""
    parallel = load.tensor_parallel_size
    attention_width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    width = 4 * model.hidden_size + (attention_width + model.mlp_width) // parallel
    tokens = max(load.batched_tokens, load.max_num_seqs)
    return tokens * width * max(ACTIVATION_BITS, load.weight_bits) // 8 + (
        load.max_num_seqs * model.vocab_size * SAMPLER_BYTES
    )


def fit(model: Model, load: Load, gpu: GPU) -> Fit:
    """Put a model under a load into a GPU, or into as many of them as `tensor_parallel_size` says."""
    parallel = load.tensor_parallel_size
    # Norms are held by each GPU, and KV heads are not split further than one for each.
    weights = math.ceil(weight_bytes(model, load) / parallel)
    weights += model.num_other_weights * load.weight_bits // 8 if parallel > 1 else 0
    kv_heads = math.ceil(model.num_kv_heads / parallel)
    per_token = kv_bytes_per_token(model, load) // model.num_kv_heads * kv_heads
    per_sequence = math.ceil(load.max_model_len / BLOCK_TOKENS) * BLOCK_TOKENS * per_token
    quantization = read_quantization(model, load.quantization)
    problem = quantization.problem if quantization else ""
    if gpu.usable_bytes * (1 - load.utilization) < CONTEXT_BYTES:
        problem = problem or "gpu_memory_utilization leaves less than 0.4 GiB for CUDA itself: lower it"
    return Fit(
        weight_bytes=weights,
        activation_bytes=activation_bytes(model, load),
        graph_bytes=0 if load.is_eager else GRAPH_BYTES,
        workspace_bytes=WORKSPACE_BYTES + (PARALLEL_BYTES if parallel > 1 else 0),
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_sequence,
        kv_bytes=per_sequence * load.max_num_seqs,
        budget_bytes=int(gpu.usable_bytes * load.utilization),
        problem=problem,
    )


# --- Advice ----------------------------------------------------------------------------------------------------------

SHORT, STEP = 2048, 256
"""A shorter window than that leaves no room for three passages, a question and an answer."""
USUAL_LENGTHS = (8192, 4096, SHORT)
SPARE_SEQUENCES = 4
"""Fewer at once are not worth a GPU; they are advised only where nothing else fits."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A change that makes the worst case fit."""

    text: str
    load: Load
    gpu: GPU


def advise(model: Model, load: Load, gpu: GPU) -> list[Advice]:
    """List changes, the least first; each of them alone suffices."""
    found = list(_smaller_loads(model, load, gpu, ""))
    quantised = _quantised(model, load)
    if quantised is not None:
        said = f"engine_options.quantization: {quantised.quantization}"
        if fit(model, quantised, gpu).fits:
            found.append(Advice(said, quantised, gpu))
        elif not found:
            found += _smaller_loads(model, quantised, gpu, f"{said} and ")
    for other in sorted((GPU(name, mib * MIB) for name, mib in GPUS.items()), key=lambda one: one.memory_bytes):
        if other.memory_bytes > gpu.memory_bytes and fit(model, load, other).fits:
            found.append(Advice(f"a larger GPU: {other.name}", load, other))
            break
    return found or list(_several_gpus(model, load, gpu))


def _quantised(model: Model, load: Load) -> Load | None:
    """Ask for 8 bits if the weights have 16, or have a method that vLLM refuses to apply."""
    if model.quantization is not None or load.quantization not in (None, "bitsandbytes"):
        return None
    return replace(load, quantization="fp8_per_tensor")


def _smaller_loads(model: Model, load: Load, gpu: GPU, prefix: str) -> Iterator[Advice]:
    """Shorten the window, run fewer sequences, or both where neither is enough."""
    shorter, fewer = _shorter(model, load, gpu), _fewer(model, load, gpu)
    is_enough = fewer is not None and fewer.max_num_seqs >= SPARE_SEQUENCES
    if shorter is not None:
        yield Advice(f"{prefix}max_model_len: {shorter.max_model_len}", shorter, gpu)
    if shorter is None and not is_enough:
        for length in USUAL_LENGTHS:
            both = _fewer(model, replace(load, max_model_len=length), gpu) if length < load.max_model_len else None
            if both is not None and both.max_num_seqs >= SPARE_SEQUENCES:
                yield Advice(f"{prefix}max_model_len: {length} with max_num_seqs: {both.max_num_seqs}", both, gpu)
                return
    if fewer is not None and (is_enough or shorter is None):
        yield Advice(f"{prefix}max_num_seqs: {fewer.max_num_seqs}", fewer, gpu)


def _shorter(model: Model, load: Load, gpu: GPU) -> Load | None:
    found = fit(model, load, gpu)
    tokens = found.free_bytes // (found.kv_bytes_per_token * load.max_num_seqs) // STEP * STEP
    shorter = replace(load, max_model_len=tokens) if SHORT <= tokens < load.max_model_len else None
    return shorter if shorter and fit(model, shorter, gpu).fits else None


def _fewer(model: Model, load: Load, gpu: GPU) -> Load | None:
    """Find the most sequences that fit; what a sequence takes of the sampler's memory is freed with it."""
    least, most = 0, load.max_num_seqs
    while least < most:
        middle = (least + most + 1) // 2
        if fit(model, replace(load, max_num_seqs=middle), gpu).fits:
            least = middle
        else:
            most = middle - 1
    return replace(load, max_num_seqs=least) if least else None


def _several_gpus(model: Model, load: Load, gpu: GPU) -> Iterator[Advice]:
    for parallel in (2, 4, 8):
        spread = replace(load, tensor_parallel_size=parallel)
        if parallel > load.tensor_parallel_size and not model.num_heads % parallel and fit(model, spread, gpu).fits:
            yield Advice(f"engine_options.tensor_parallel_size: {parallel}, with as many GPUs", spread, gpu)
            return


# --- Words -----------------------------------------------------------------------------------------------------------


def explain(model: Model, load: Load, gpu: GPU) -> str:
    """Show the arithmetic, a line for each part."""
    found = fit(model, load, gpu)
    quantization = read_quantization(model, load.quantization)
    kind = f"{quantization.name}, {quantization.bits:.3g} bits a weight" if quantization else f"{load.weight_bits} bits"
    each = " on each GPU" if load.tensor_parallel_size > 1 else ""
    lines = (
        ("weights", found.weight_bytes, f"{model.num_parameters / 1e9:.2f} billion parameters, {kind}{each}"),
        (
            "overhead",
            found.overhead_bytes,
            f"activations {_gib(found.activation_bytes)}, CUDA graphs {_gib(found.graph_bytes)}, "
            f"workspaces {_gib(found.workspace_bytes)}",
        ),
        (
            "KV cache",
            found.kv_bytes,
            f"{load.max_num_seqs} sequences x {load.max_model_len:,} tokens x {found.kv_bytes_per_token:,} bytes: "
            "the worst case, all at full length",
        ),
        ("needed", found.needed_bytes, ""),
        (
            "available",
            found.budget_bytes,
            f"{_gib(gpu.memory_bytes)} less {_gib(gpu.memory_bytes - gpu.usable_bytes)} for the driver, "
            f"x {load.utilization:g} (gpu_memory_utilization)",
        ),
    )
    return "\n".join(f"{name:<9} {_gib(size):>10}  {note}".rstrip() for name, size, note in lines)


def numbers(model: Model, load: Load, gpu: GPU) -> dict[str, Any]:
    """Give the same as numbers, for scripts."""
    found = fit(model, load, gpu)
    return {
        "gpu": {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "usable_bytes": gpu.usable_bytes},
        "num_parameters": model.num_parameters,
        "load": asdict(load),
        **{key: value for key, value in asdict(found).items() if key != "problem"},
        "overhead_bytes": found.overhead_bytes,
        "needed_bytes": found.needed_bytes,
        "num_full_sequences": found.num_full_sequences,
        "starts": found.starts,
        "fits": found.fits,
    }


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
