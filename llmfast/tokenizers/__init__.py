"""Text to token ids and back, losslessly."""

from .bpe import END_OF_TEXT, StreamDecoder, Tokenizer

__all__ = ["END_OF_TEXT", "StreamDecoder", "Tokenizer"]
