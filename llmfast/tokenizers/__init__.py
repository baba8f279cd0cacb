"""Text to token ids and back: our own vocabularies, losslessly, and those that come with other libraries' models."""

from .bpe import END_OF_TEXT, StreamDecoder, Tokenizer
from .pretrained import PretrainedTokenizer

__all__ = ["END_OF_TEXT", "PretrainedTokenizer", "StreamDecoder", "Tokenizer"]
