"""Rows as the two models read them: token streams, the vocabulary that they share, and the positions that pair."""

from .alignment import Alignment, align
from .answers import Answer
from .batch import PairedBatch
from .collator import Pack, PairedCollator, TeacherRow
from .encoder import Stream, StreamEncoder, same_processing, serialised
from .packing import best_fit, packed
from .prompts import encode_prompts
from .vocabulary import SharedVocabulary

__all__ = [
    "Alignment",
    "Answer",
    "Pack",
    "PairedBatch",
    "PairedCollator",
    "SharedVocabulary",
    "Stream",
    "StreamEncoder",
    "TeacherRow",
    "align",
    "best_fit",
    "encode_prompts",
    "packed",
    "same_processing",
    "serialised",
]
