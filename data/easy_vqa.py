"""Writes the easy-VQA data set as JSON Lines and a folder of images.

easy-VQA 1.0 (Victor Zhou, MIT licence, https://github.com/vzhou842/easy-VQA): 5,000 pictures of one coloured shape,
64 x 64 pixels, with 38,575 training and 9,673 test questions and 13 different answers. A row is::

    {"id": "test-0", "image": "images/test/0.png", "question": "what is the red shape?", "answer": "triangle",
     "category": "open"}

where ``category`` is ``yes/no`` or ``open`` and ``image`` is relative to the file that holds the row.

    python data/easy_vqa.py --output DIR
"""

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch import OutOfReach, python_package

PACKAGE = ("easy-vqa==1.0", "easy_vqa-1.0-py3-none-any.whl")
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
QUESTIONS = {"train": 38_575, "test": 9_673}


def write_split(archive: zipfile.ZipFile, split: str, folder: Path) -> None:
    """Writes ``{split}.jsonl`` and the images that it names.

    Args:
        archive: the package.
        split: ``train`` or ``test``.
        folder: where to write; it exists.

    Raises:
        OutOfReach: the package does not hold the number of questions that it should.
    """
    inside = f"easy_vqa/data/{split}"
    questions = json.loads(archive.read(f"{inside}/questions.json"))
    if len(questions) != QUESTIONS[split]:
        raise OutOfReach(f"easy-VQA's {split} part holds {len(questions)} questions, not {QUESTIONS[split]}.")
    images = folder / "images" / split
    images.mkdir(parents=True)
    for image in sorted({int(image) for _, _, image in questions}):
        (images / f"{image}.png").write_bytes(archive.read(f"{inside}/images/{image}.png"))
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as rows:
        for number, (question, answer, image) in enumerate(questions):
            row = {
                "id": f"{split}-{number}",
                "image": f"images/{split}/{int(image)}.png",
                "question": question,
                "answer": answer,
                "category": "yes/no" if answer in ("yes", "no") else "open",
            }
            rows.write(json.dumps(row) + "\n")


def write(output: Path) -> bool:
    """Writes both splits to a folder, which appears whole or not at all.

    Args:
        output: the folder; it may exist when it is empty or holds this data set already.

    Returns:
        Whether anything was written: False when the folder holds the data set already.

    Raises:
        OutOfReach: the package cannot be fetched.
        FileExistsError: the folder holds something else.
    """
    if all((output / f"{split}.jsonl").exists() for split in QUESTIONS) and (output / "images").is_dir():
        return False
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds something else than easy-VQA: name an empty or a new folder.")
    package = python_package(*PACKAGE, SHA256)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        with zipfile.ZipFile(package) as archive:
            for split in QUESTIONS:
                write_split(archive, split, beside)
        beside.chmod(0o755)  # mkdtemp makes folders that others cannot read
        beside.replace(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the easy-VQA data set as JSON Lines.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; made when missing")
    output = parser.parse_args().output.absolute()
    try:
        written = write(output)
    except (OutOfReach, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    counts = " and ".join(f"{number:,} {split}" for split, number in QUESTIONS.items())
    print(f"{output}: {counts} questions {'written' if written else 'were there already'}")


if __name__ == "__main__":
    main()
