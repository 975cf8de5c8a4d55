"""Writes a trained model as it is shipped: bf16 safetensors and its processor, nothing of the run.

python data/ship_teacher.py --model runs/quickstart/teacher --output data/quickstart/teacher
"""

import argparse
from pathlib import Path

from vlm_taid.pretrained import ModelOptions, load_model, load_processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model in bf16.", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="the run's folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    model = load_model(ModelOptions(str(options.model), dtype="bfloat16"))
    model.save_pretrained(options.output, max_shard_size="9MB")  # files over 10 MB do not go into the repository
    load_processor(options.model).save_pretrained(options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir()) / 1e6
    print(f"{options.output}: {size:.1f} MB")


if __name__ == "__main__":
    main()
