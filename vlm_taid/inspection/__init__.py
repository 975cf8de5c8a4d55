"""inspect: the pre-flight check, what both models read of a recipe's rows and what pairs with what."""

from .command import inspect
from .pictures import Seen, seen_pictures
from .rows import InspectedRow, Piece, StreamView, inspect_row

__all__ = ["InspectedRow", "Piece", "Seen", "StreamView", "inspect", "inspect_row", "seen_pictures"]
