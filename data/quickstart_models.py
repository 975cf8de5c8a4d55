"""Makes the quickstart's models as they are before training: FastVLM with a timm ResNet and a Qwen2 decoder.

    models=runs/quickstart/models
    python data/quickstart_models.py teacher --data runs/quickstart/data --output $models/teacher-init
    python data/quickstart_models.py student --teacher data/quickstart/teacher --output $models/student-init

The teacher starts from fresh weights, and its tokenizer is learned from easy-VQA's training questions. The student is
pruned from the trained teacher: without the tower's last stage (which holds most parameters) and one of three decoder
layers; what has no counterpart in the teacher is fresh. The towers normalise with GroupNorm, so nothing is carried from
one batch to the next, and neither accumulation nor the number of ranks changes a result.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Config, set_seed

from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.students import assemble, inherit, train_tokenizer

IMAGE_SIZE = 64
TOWER = "resnet10t"
# The pictures are light: centred at their mean, the shapes' colours are what is left. With the wider start of the
# decoder's weights, as narrow decoders want it, a model begins to look at the picture after 100 steps instead of 500.
MEAN, DEVIATION = 0.9, 0.2
INITIALIZER_RANGE = 0.1


TOWER_ARGS = {"norm_layer": "groupnorm1", "output_stride": 16}
# timm's ResNet without its fourth stage: no blocks, and as many channels as the third stage gives
PRUNED_TOWER_ARGS = TOWER_ARGS | {"layers": [1, 1, 1, 0], "channels": [64, 128, 256, 256]}
WIDTH, LAYERS, KEPT_LAYERS = 128, 3, (0, 2)


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


def make(tower_args: dict[str, Any], layers: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Any, Any]:
    """A model of fresh weights and its processor."""
    set_seed(seed)
    decoder = Qwen2Config(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
    )
    mean, deviation = (MEAN, MEAN, MEAN), (DEVIATION, DEVIATION, DEVIATION)
    return assemble(TOWER, decoder, tokenizer, IMAGE_SIZE, tower_args=tower_args, image_mean=mean, image_std=deviation)


def teacher(data: Path) -> tuple[Any, Any]:
    """The teacher before its training, from the folder that data/easy_vqa.py wrote."""
    return make(TOWER_ARGS, LAYERS, question_tokenizer(data), seed=1)


def student(folder: Path) -> tuple[Any, Any]:
    """The student, pruned from the trained teacher in that folder, with the teacher's processor."""
    processor = load_processor(folder)
    model, _ = make(PRUNED_TOWER_ARGS, len(KEPT_LAYERS), processor.tokenizer, seed=2)
    fresh = inherit(model, load_model(ModelOptions(str(folder))), KEPT_LAYERS)
    print(f"fresh weights: {', '.join(fresh)}")
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's models.", allow_abbrev=False)
    parser.add_argument("model", choices=["teacher", "student"])
    parser.add_argument("--data", type=Path, help="teacher: the folder that data/easy_vqa.py wrote")
    parser.add_argument("--teacher", type=Path, help="student: the trained teacher's folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write the model to")
    options = parser.parse_args()
    source = options.data if options.model == "teacher" else options.teacher
    if source is None:
        parser.error("teacher needs --data, student needs --teacher")
    try:
        model, processor = (teacher if options.model == "teacher" else student)(source)
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)
        print(f"{options.output}: {model.num_parameters():,} parameters")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
