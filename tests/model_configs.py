"""What the config.json of known models says, as far as it decides about their size, with published figures."""

from typing import Any

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


def config(
    family: str, layers: int, hidden: int, width: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """Name the fields as config.json does."""
    return {
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131_072,
        **more,
    }


MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
QWEN3_30B = config("Qwen3Moe", 48, 2048, 6144, 32, 4, 151_936, head_dim=128, mlp_only_layers=[], **MOE)
QWEN3_30B["max_position_embeddings"] = 262_144

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": config("Llama", 32, 4096, 14_336, 32, 8, 128_256, tie_word_embeddings=False),
    "Llama-3.2-1B": config("Llama", 16, 2048, 8192, 32, 8, 128_256, head_dim=64, tie_word_embeddings=True),
    "Llama-3.1-70B": config("Llama", 80, 8192, 28_672, 64, 8, 128_256),
    "Llama-2-7B": config("Llama", 32, 4096, 11_008, 32, 32, 32_000),
    "TinyLlama-1.1B": config("Llama", 22, 2048, 5632, 32, 4, 32_000),
    "SmolLM2-135M": config("Llama", 30, 576, 1536, 9, 3, 49_152, tie_word_embeddings=True),
    "Mistral-7B-v0.1": config("Mistral", 32, 4096, 14_336, 32, 8, 32_000, sliding_window=4096),
    "Qwen2.5-7B": config("Qwen2", 28, 3584, 18_944, 28, 4, 152_064, tie_word_embeddings=False),
    "Qwen2.5-0.5B": config("Qwen2", 24, 896, 4864, 14, 2, 151_936, tie_word_embeddings=True),
    "Qwen3-0.6B": config("Qwen3", 28, 1024, 3072, 16, 8, 151_936, tie_word_embeddings=True, head_dim=128),
    "Qwen3-4B": config("Qwen3", 36, 2560, 9728, 32, 8, 151_936, tie_word_embeddings=True, head_dim=128),
    "Qwen3-8B": config("Qwen3", 36, 4096, 12_288, 32, 8, 151_936, tie_word_embeddings=False, head_dim=128),
    "Qwen3-30B-A3B": QWEN3_30B,
    "Mixtral-8x7B": config("Mixtral", 32, 4096, 14_336, 32, 8, 32_000, num_local_experts=8, num_experts_per_tok=2),
    "Gemma-2B": config("Gemma", 18, 2048, 16_384, 8, 1, 256_000, head_dim=256),
    "Gemma-2-9B": config("Gemma2", 42, 3584, 14_336, 16, 8, 256_000, head_dim=256),
    "Phi-3-mini": config("Phi3", 32, 3072, 8192, 32, 32, 32_064),
    "SmolLM3-3B": config("SmolLM3", 36, 2048, 11_008, 16, 4, 128_256),
}

BILLIONS = {
    "Llama-3.1-8B": 8.03,
    "Llama-3.2-1B": 1.24,
    "Llama-3.1-70B": 70.6,
    "Llama-2-7B": 6.74,
    "TinyLlama-1.1B": 1.10,
    "SmolLM2-135M": 0.1345,
    "Mistral-7B-v0.1": 7.24,
    "Qwen2.5-7B": 7.62,
    "Qwen2.5-0.5B": 0.494,
    "Qwen3-0.6B": 0.596,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-30B-A3B": 30.5,
    "Mixtral-8x7B": 46.7,
    "Gemma-2B": 2.51,
    "Gemma-2-9B": 9.24,
    "Phi-3-mini": 3.82,
    "SmolLM3-3B": 3.08,
}
"""Parameters as the hub's pages state them, 10**9."""

SERVED = {
    "Qwen/Qwen2.5-7B-Instruct-AWQ": CONFIGS["Qwen2.5-7B"] | {"quantization_config": AWQ},
    "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8": QWEN3_30B | {"quantization_config": FP8},
    "mlabonne/TwinLlama-3.1-8B-DPO": CONFIGS["Llama-3.1-8B"],
}
"""The models that the files in deploy/ name."""
