"""Rows as the two models read them: token streams, the vocabulary that they share, and the positions that pair."""

from .alignment import Alignment, align
from .answers import Answer
from .collator import PairedBatch, PairedCollator, TeacherRow
from .encoder import Stream, StreamEncoder, same_processing
from .prompts import encode_prompts
from .vocabulary import SharedVocabulary

__all__ = [
    "Alignment",
    "Answer",
    "PairedBatch",
    "PairedCollator",
    "SharedVocabulary",
    "Stream",
    "StreamEncoder",
    "TeacherRow",
    "align",
    "encode_prompts",
    "same_processing",
]
