"""Rows of many formats and places become Conversations: turns of text and checked pictures."""

from vlm_taid.data.conversation import Conversation, Part, Role, Turn
from vlm_taid.data.formats import FORMATS, FormatName, RowContext
from vlm_taid.data.images import load_image
from vlm_taid.data.sources import ConversationDataset, DataOptions
from vlm_taid.data.streaming import StreamedRows
from vlm_taid.data.tables import SourceOptions

__all__ = [
    "FORMATS",
    "Conversation",
    "ConversationDataset",
    "DataOptions",
    "FormatName",
    "Part",
    "Role",
    "RowContext",
    "SourceOptions",
    "StreamedRows",
    "Turn",
    "load_image",
]
