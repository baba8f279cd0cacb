"""Text to token ids and back: our own vocabularies, losslessly, and those that come with other libraries' models."""

from .bpe import END_OF_TEXT, StreamDecoder, Tokenizer
from .pretrained import AnyTokenizer, PretrainedTokenizer, load_saved

__all__ = ["END_OF_TEXT", "AnyTokenizer", "PretrainedTokenizer", "StreamDecoder", "Tokenizer", "load_saved"]
