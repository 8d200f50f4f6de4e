"""Chat models that a test makes: real Llamas of a few hundred kilobytes, each of which only ever says one word."""

from pathlib import Path

VOCABULARY = ("<s>", "<unk>", "\n", "system", "user", "assistant", "alpha", "beta")
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}assistant"


def make_model(folder: Path, *, says: str, max_length: int = 2048) -> Path:
    """Write a model that answers every prompt with `says`, again and again, until it has to stop."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=max_length,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    # Attention and MLP add nothing, every token looks alike, and the head turns that into one word.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[VOCABULARY.index(says)] = 1
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
