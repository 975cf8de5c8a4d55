"""What the families share: a tokenizer, sizes, saving; and rows of pictures and questions."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from vlm_taid.students import train_tokenizer

TEXTS = [
    "what shape is in the image?", "is there a red circle?", "what color is the square?",
    "a red circle, a blue square",
    "The quick brown fox jumps over the lazy dog.", "yes", "no",
    "triangle rectangle green gray black brown teal yellow",
] * 3  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "black": (0, 0, 0), "white": (255,) * 3}


def tokenizer() -> PreTrainedTokenizerFast:
    """The small byte-level BPE tokenizer that all families use unless they are given another."""
    return train_tokenizer(TEXTS, 400)


def tokenizer_with(
    base: PreTrainedTokenizerFast | None, *tokens: str, bos: str | None, eos: str, pad: str = "<|pad|>",
    adds_bos: bool = False, **roles: str,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A copy of a tokenizer with a family's special tokens, and with names for some (image_token="<image>").

    adds_bos: a begin of text before every text, as Llama's, Gemma's and Mistral's tokenizers write it.
    """
    backend = Tokenizer.from_str((base or tokenizer()).backend_tokenizer.to_str())
    special = dict.fromkeys([token for token in (bos, eos, pad) if token] + [*tokens, *roles.values()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos and bos:
        begin = processors.TemplateProcessing(  # pyright: ignore[reportCallIssue]
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        old = backend.post_processor
        backend.post_processor = begin if old is None else processors.Sequence([old, begin])  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        clean_up_tokenization_spaces=False, extra_special_tokens=roles,
    )  # fmt: skip


def text_sizes(vocab_size: int, width: int = 32, layers: int = 2, **more) -> dict:
    return {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def save(folder: Path, model, processor) -> str:
    tokens = getattr(processor, "tokenizer", processor)
    model.generation_config.update(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def vqa_rows(folder: Path, *, rows: int = 8, images: bool = True, name: str = "rows.jsonl") -> str:
    """Squares of one colour with a question, the answers ragged in length; some rows without a picture if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["red", "a red circle", "yes", "a red circle, a blue square", "no", "green", "The quick brown fox", "blue"]
    lines = []
    for i in range(rows):
        row = {"question": f"what is in the image {i}?", "answer": words[i % len(words)]}
        if images:
            colour = list(COLOURS)[i % len(COLOURS)]
            Image.new("RGB", (40 + 8 * (i % 3), 64), COLOURS[colour]).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        lines.append(json.dumps(row))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)
