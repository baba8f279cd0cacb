"""Text sources -> a folder of token shards -> stateless batches."""

from llmfast.data.dataset import Dataset
from llmfast.data.manifest import Manifest, Split
from llmfast.data.prepare import prepare
from llmfast.data.shards import open_shard, write_shard
from llmfast.data.sources import Corpus, Document, read_source

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
