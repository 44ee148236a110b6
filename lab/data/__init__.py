"""Real text as fixed-length token batches: corpus -> cached byte-level BPE tokens -> batches on the device.

Nothing is downloaded by default: the corpus is the source of the running Python's standard library.
"""

from lab.data.batches import Batches, make_batches
from lab.data.corpus import Corpus, open_corpus
from lab.data.order import SequenceOrder
from lab.data.tokens import END_OF_TEXT, load_tokenizer, token_stream

__all__ = [
    "END_OF_TEXT",
    "Batches",
    "Corpus",
    "SequenceOrder",
    "load_tokenizer",
    "make_batches",
    "open_corpus",
    "token_stream",
]
