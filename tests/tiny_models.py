"""Models that a test makes: real ones, of a few megabytes at most.

Chat models are Llamas that only ever say one word, cross-encoders BERTs that score a text by one word, encoders BERTs
that add up a vector per word, or of any architecture with random weights.
"""

from pathlib import Path
from typing import Any

VOCABULARY = ("<s>", "<unk>", "\n", "system", "user", "assistant", "alpha", "beta")
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}assistant"


def make_model(folder: Path, *, says: str, max_length: int = 2048) -> Path:
    """Write a model that answers every prompt with `says`, again and again, until it has to stop."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return _make_llama(folder, len(VOCABULARY), says=VOCABULARY.index(says), max_length=max_length)


def make_spelling_model(folder: Path, *, max_length: int = 2048) -> Path:
    """Write a model that knows every byte, and writes the first of `"}]` or of the digits that it may write next."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    first = ["<s>", "</s>", '"', "}", "]", *"0123456789"]
    vocabulary = [*first, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(first))]
    spelling = Tokenizer(BPE({token: n for n, token in enumerate(vocabulary)}, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return _make_llama(folder, len(vocabulary), says=vocabulary.index('"'), max_length=max_length, ends=1)


def _make_llama(folder: Path, vocab_size: int, *, says: int, max_length: int, ends: int | None = None) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=max_length,
            bos_token_id=0,
            eos_token_id=ends,
        )
    )
    # Attention and MLP add nothing, every token looks alike, and the head turns that into one word.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[says] = 1
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_cross_encoder(folder: Path, *, marker: str, max_length: int = 64, num_labels: int = 1) -> Path:
    """Write a cross-encoder that scores a pair by the share of `marker` among its tokens; each word is a token."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", marker))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = Lowercase()
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    ).save_pretrained(folder)

    size = 8
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=max_length,
        num_labels=num_labels,
        # So large that a norm keeps what is longer longer.
        layer_norm_eps=100.0,
    )
    model = BertForSequenceClassification(config)
    direction = torch.tensor([1.0, -1.0]).repeat(size // 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
        # Only the marker is seen. Every token looks at all others alike, so the first one becomes their mean.
        model.bert.embeddings.word_embeddings.weight[vocabulary[marker]] = 100 * direction
        attention = model.bert.encoder.layer[0].attention
        for layer in (attention.self.value, attention.output.dense, model.bert.pooler.dense):
            layer.weight.copy_(torch.eye(size))
        model.classifier.weight[:] = 100 * direction
    model.save_pretrained(folder)
    return folder


def make_random_encoder(
    folder: Path, transformer: Any, *, pooling: str = "mean", prompts: dict[str, str] | None = None
) -> Path:
    """Write a sentence-transformers model with a window of 64 tokens, whose transformer has random weights.

    The transformer's configuration needs room for 20 entries in the vocabulary, of which the first is the padding.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, processors
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModel, PreTrainedTokenizerFast

    entries = ["<pad>", "<unk>", "<s>", "</s>", *"query passage : A table stays in one piece and its heading ?".split()]
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(entries)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    hf = folder / "transformer"
    AutoModel.from_config(transformer).save_pretrained(hf)
    tokenizer.save_pretrained(hf)
    module = Transformer(str(hf), max_seq_length=64)
    model = SentenceTransformer(
        modules=[module, Pooling(module.get_embedding_dimension(), pooling_mode=pooling)], prompts=prompts, device="cpu"
    )
    model.save(str(folder / "encoder"))
    return folder / "encoder"


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
