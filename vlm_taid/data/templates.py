"""What a chat template leaves to its tokenizer."""

from __future__ import annotations

from typing import Any


def begin_of_text(tokenizer: Any) -> str:
    """The token that a tokenizer writes before every text, or ""."""
    return tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""


def left_out_begin(processor: Any) -> str:
    """What a prompt rendered by a processor's template must begin with, or "".

    LLaVA 1.5's and NeXT's templates leave the begin of text out, and their processors' ``apply_chat_template`` writes
    it; no tokenizer's does: a row begins as the model's prompts do.
    """
    is_processor = hasattr(processor, "tokenizer") and getattr(processor, "chat_template", None)
    return begin_of_text(processor.tokenizer) if is_processor else ""
