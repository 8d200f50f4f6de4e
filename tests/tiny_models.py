"""Models that a test makes: real ones, of a few megabytes at most.

Chat models are Llamas that only ever say one word; encoders are BERTs that add up a vector per word.
"""

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


def make_encoder(folder: Path, *, seed: int = 0, dimension: int = 32, knows_words: bool = True) -> Path:
    """Write an encoder whose vector of a text depends on its words alone; without words all texts look alike to it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from app.models import resolve_encoder

    tokenizer = AutoTokenizer.from_pretrained(resolve_encoder("all-MiniLM-L6-v2").source)
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=dimension,
            intermediate_size=dimension,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=256,
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), model.embeddings.position_embeddings.weight):
            parameter.zero_()
        for layer in model.encoder.layer:
            layer.attention.output.LayerNorm.weight.fill_(1)
            layer.output.LayerNorm.weight.fill_(1)
        if knows_words:
            model.embeddings.word_embeddings.weight.normal_()
        else:
            model.embeddings.word_embeddings.weight.copy_(torch.randn(dimension).expand(len(tokenizer), dimension))
    bare = folder.with_name(f"{folder.name}-bare")
    model.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    transformer = Transformer(str(bare), max_seq_length=256)
    SentenceTransformer(modules=[transformer, Pooling(dimension)], device="cpu").save(str(folder))
    return folder
