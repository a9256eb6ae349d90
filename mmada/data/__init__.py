"""What is read: text sources, shards of tokens, packed rows, and which rows make a batch."""

from mmada.data.packing import IGNORE_INDEX, PackedRows
from mmada.data.prepare import PreparedText, open_prepared, prepare
from mmada.data.sampling import global_batch_indices, rank_slice, sample_ids
from mmada.data.shards import TokenStream
from mmada.data.sources import TextSource
from mmada.tokenizer import load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "PackedRows",
    "PreparedText",
    "TextSource",
    "TokenStream",
    "global_batch_indices",
    "load_tokenizer",
    "open_prepared",
    "prepare",
    "rank_slice",
    "sample_ids",
]
