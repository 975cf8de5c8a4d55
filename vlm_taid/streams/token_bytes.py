"""TokenBytes: the text that each token of a tokenizer stands for, in bytes."""

from __future__ import annotations

import re
from typing import Any, Literal

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """What a tokenizer's tokens stand for: ``TokenBytes(tokenizer)[id]``.

    Byte-level BPE writes bytes as printable characters (``Ġthe`` is ``b" the"``), SentencePiece's BPE and Unigram
    write a blank as U+2581 and, with byte fallback, single bytes as ``<0xE2>``. Added tokens stand for themselves.
    A tokenizer of another kind (``plain``) is taken at its word, as are tokens that its kind cannot explain.

    Args:
        tokenizer: a fast tokenizer.

    Attributes:
        kind: how the tokens are written.
        special, added: ids of the special tokens, and of all that stand in no vocabulary file (special ones too).
    """

    def __init__(self, tokenizer: Any):
        backend = tokenizer.backend_tokenizer
        parts = repr(backend.decoder) + repr(backend.pre_tokenizer)
        self.kind: Literal["byte_level", "sentencepiece", "plain"] = "plain"
        if "ByteLevel(" in parts:
            self.kind = "byte_level"
        elif "Metaspace(" in parts or '"▁"' in parts:
            self.kind = "sentencepiece"
        self._byte_fallback = "ByteFallback(" in parts
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.added = set(added) | self.special
        # SentencePiece's own pieces (runs of blanks, of newlines) may stand among the added tokens
        self._literal = {i for i in added if self.kind != "sentencepiece"} | self.special
        self._tokenizer, self._unknown = tokenizer, tokenizer.unk_token_id
        self._known: dict[int, bytes | None] = {}

    def __getitem__(self, token_id: int) -> bytes | None:
        """The token's bytes; None for the unknown token and for an id that names no token."""
        if token_id not in self._known:
            self._known[token_id] = self.of(token_id, self._tokenizer.convert_ids_to_tokens(token_id))
        return self._known[token_id]

    def text(self, token_id: int) -> str:
        """What the token stands for, to be shown; bytes that are no whole character are written as ``\\xNN``."""
        if token_id in self.special:
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        piece = self[token_id]
        return f"<{token_id}>" if piece is None else piece.decode(errors="backslashreplace")

    def of(self, token_id: int, token: str | None) -> bytes | None:
        """The bytes of the token with that id and string."""
        if token is None or token_id == self._unknown:
            return None
        if token_id in self._literal or self.kind == "plain":
            return token.encode()
        if self.kind == "byte_level":
            if all(character in BYTE_OF for character in token):
                return bytes(BYTE_OF[character] for character in token)
            return token.encode()
        if self._byte_fallback and (byte := BYTE_PIECE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()
