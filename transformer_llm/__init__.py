"""Transformer LLM From Scratch: the code of the book. The names most users need; they load when first used."""
__version__ = "0.1.0"

_HOME = {
    "InputError": "foundations",
    "MultiHeadAttention": "attention", "KVCache": "attention",
    "FeedForward": "feedforward", "SwiGLU": "feedforward",
    "Rotary": "embeddings",
    "GPT": "transformer", "GPTConfig": "transformer",
    "CharTokenizer": "tokenizer", "BPETokenizer": "tokenizer", "load_tokenizer": "tokenizer",
    "TokenData": "dataset", "prepare_tokens": "dataset", "load_shakespeare": "dataset",
    "load_model": "checkpoints",
    "Trainer": "training", "TrainingConfig": "training",
    "Sampling": "generation", "generate": "generation", "generate_text": "generation", "stream_text": "generation",
    "FastTrainer": "performance", "Decoder": "decoding",
    "load_pretrained_tokenizer": "pretrained", "Conversation": "chat", "score_text": "evaluation",
}
__all__ = [*_HOME]


def __getattr__(name):
    "Import a public name's module when the name is first used: `import transformer_llm` alone costs nothing."
    if name in _HOME:
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
