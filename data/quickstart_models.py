"""Makes the quickstart's teacher and student as untrained model folders, from easy-VQA's training questions.

    python data/easy_vqa.py --output runs/data/easy_vqa
    python data/quickstart_models.py --data runs/data/easy_vqa --output runs/quickstart/models

writes ``teacher-init`` and ``student-init`` below the output folder: transformers' FastVLM classes, each with a narrow
timm ResNet and a small Qwen2 decoder, over one tokenizer and one image processor. The towers normalise with GroupNorm,
so nothing is carried from one batch to the next, and neither accumulation nor the number of ranks changes a result.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Config, set_seed

from vlm_taid.errors import InputError
from vlm_taid.students import assemble, train_tokenizer

IMAGE_SIZE = 64
TOWER = "resnet10t"
# The pictures are light: centred at their mean, the shapes' colours are what is left. With the wider start of the
# decoder's weights, as narrow decoders want it, a model begins to look at the picture after 100 steps instead of 500.
MEAN, DEVIATION = 0.9, 0.2
INITIALIZER_RANGE = 0.1


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        tower_args: timm's arguments of the tower.
        width: the decoder's hidden width.
        layers: the decoder's layers.
        seed: of the fresh weights.
    """

    tower_args: dict[str, Any]
    width: int
    layers: int
    seed: int


SIZES = {
    "teacher-init": Size({"norm_layer": "groupnorm1", "output_stride": 16}, width=128, layers=3, seed=1),
    "student-init": Size(
        {"norm_layer": "groupnorm1", "output_stride": 16, "channels": [32, 64, 128, 160], "stem_width": 16},
        width=128,
        layers=2,
        seed=2,
    ),
}


def question_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of easy-VQA's training questions and answers, in which every answer is one token.

    Args:
        data: the folder with ``train.jsonl``.

    Raises:
        InputError: the file is missing, or a row has no question or no answer.
    """
    file = data / "train.jsonl"
    if not file.exists():
        raise InputError(f"{file} is missing; write it with data/easy_vqa.py first")
    texts: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not row.get("question") or not row.get("answer"):
            raise InputError(f"{file}:{number}: a row needs a question and an answer")
        texts += [row["question"], row["answer"]]
    return train_tokenizer(texts)


def make(size: Size, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Makes one model and saves it with its processor.

    Returns:
        The number of its parameters.
    """
    set_seed(size.seed)
    decoder = Qwen2Config(
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
    )
    model, processor = assemble(
        TOWER,
        decoder,
        tokenizer,
        IMAGE_SIZE,
        tower_args=size.tower_args,
        image_mean=(MEAN, MEAN, MEAN),
        image_std=(DEVIATION, DEVIATION, DEVIATION),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's untrained models.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="the folder that data/easy_vqa.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write both models to")
    options = parser.parse_args()
    try:
        tokenizer = question_tokenizer(options.data)
        for name, size in SIZES.items():
            parameters = make(size, tokenizer, options.output / name)
            print(f"{options.output / name}: {parameters:,} parameters")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
