"""Text sources -> a folder of token shards -> stateless batches."""

from .dataset import Dataset
from .manifest import Manifest, Split
from .prepare import prepare
from .shards import open_shard, write_shard
from .sources import Corpus, Document, read_source

__all__ = [
    "Corpus",
    "Dataset",
    "Document",
    "Manifest",
    "Split",
    "open_shard",
    "prepare",
    "read_source",
    "write_shard",
]
