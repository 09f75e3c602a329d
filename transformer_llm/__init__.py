"""Transformer LLM From Scratch: the code of the book. The names most users need; they load when first used."""
__version__ = "0.1.0"
TYPE_CHECKING = False  # type checkers read it as True by its name; importing it would load `typing` and much besides

_HOME = {
    "InputError": "foundations",
    "MultiHeadAttention": "attention", "KVCache": "attention",
    "FeedForward": "feedforward", "SwiGLU": "feedforward",
    "Rotary": "embeddings",
    "GPT": "transformer", "GPTConfig": "transformer",
    "CharTokenizer": "tokenizer", "BPETokenizer": "tokenizer", "load_tokenizer": "tokenizer",
    "TokenData": "dataset", "prepare_tokens": "dataset", "load_shakespeare": "corpora",
    "load_model": "checkpoints",
    "Trainer": "training", "TrainingConfig": "training",
    "Sampling": "generation", "generate": "generation", "generate_text": "generation", "stream_text": "generation",
    "FastTrainer": "performance", "Decoder": "decoding",
    "load_pretrained_tokenizer": "pretrained", "Conversation": "chat", "score_text": "evaluation",
}
__all__ = [*_HOME]

if TYPE_CHECKING:  # what editors and type checkers read; a test holds it equal to _HOME
    from .foundations import InputError as InputError
    from .attention import MultiHeadAttention as MultiHeadAttention
    from .attention import KVCache as KVCache
    from .feedforward import FeedForward as FeedForward
    from .feedforward import SwiGLU as SwiGLU
    from .embeddings import Rotary as Rotary
    from .transformer import GPT as GPT
    from .transformer import GPTConfig as GPTConfig
    from .tokenizer import CharTokenizer as CharTokenizer
    from .tokenizer import BPETokenizer as BPETokenizer
    from .tokenizer import load_tokenizer as load_tokenizer
    from .dataset import TokenData as TokenData
    from .dataset import prepare_tokens as prepare_tokens
    from .corpora import load_shakespeare as load_shakespeare
    from .checkpoints import load_model as load_model
    from .training import Trainer as Trainer
    from .training import TrainingConfig as TrainingConfig
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .generation import generate_text as generate_text
    from .generation import stream_text as stream_text
    from .performance import FastTrainer as FastTrainer
    from .decoding import Decoder as Decoder
    from .pretrained import load_pretrained_tokenizer as load_pretrained_tokenizer
    from .chat import Conversation as Conversation
    from .evaluation import score_text as score_text
else:

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
