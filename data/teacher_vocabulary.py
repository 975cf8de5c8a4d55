"""Gives a language-only student its teacher's tokenizer, chat template and vocabulary size.

    python data/teacher_vocabulary.py --student TinyLlama/TinyLlama_v1.1 \
        --teacher microsoft/Phi-3-mini-4k-instruct --output runs/models/tinyllama-phi3

For a base student without a chat template whose tokenizer is the teacher's but for added tokens. The embeddings of
added tokens are drawn around the mean of the others, as transformers does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vlm_taid.errors import InputError
from vlm_taid.parsing import Parser
from vlm_taid.pretrained import ModelOptions, load_model, load_processor


def teacher_vocabulary(student: str, teacher: str, output: Path, seed: int = 0) -> None:
    """Writes the student with the teacher's tokenizer.

    Args:
        student: folder or hub id of a causal language model.
        teacher: folder or hub id of the model whose tokenizer and chat template it takes.
        output: the folder to write.
        seed: of the new tokens' embeddings.

    Raises:
        InputError: the two vocabularies give a token of the student another id.
    """
    tokenizer: Any = load_processor(teacher)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    theirs, mine = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(student).get_vocab()
    moved = [token for token, i in mine.items() if theirs.get(token, i) != i]
    known = sum(token in theirs for token in mine)
    if moved or known < 0.99 * len(mine):
        raise InputError(
            f"{student} and {teacher} have other vocabularies ({len(moved)} tokens have another id, {known} of "
            f"{len(mine)} are known): give the student a chat template of its own instead"
        )
    torch.manual_seed(seed)
    model = load_model(ModelOptions(student, dtype="float32"))
    model.resize_token_embeddings(len(tokenizer))
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_function_arguments(teacher_vocabulary, as_positional=False)
    try:
        teacher_vocabulary(**vars(parser.parse(sys.argv[1:])[1]))
    except InputError as error:
        sys.exit(f"teacher_vocabulary: {error}")
