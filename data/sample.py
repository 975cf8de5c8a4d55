"""Writes the small sample of real rows that the tests use: ``data/sample/``.

The sample is committed, so this script only documents how it was made, and makes it anew:

- ``vqa.jsonl``, ``images/``: 240 training questions on the first 60 pictures of easy-VQA (MIT);
- ``emoji.jsonl``, ``images/emoji-*.png``: 60 questions on 15 scenes of OpenMoji pictures (CC BY-SA 4.0);
- ``glosses.jsonl``: 240 nouns of WordNet 3.0 with their glosses, evenly spread over its noun file (WordNet licence).

    apt-get download wordnet-base && python data/sample.py --wordnet wordnet-base_*.deb --output data/sample
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import emoji_scenes
from easy_vqa import PACKAGE, SHA256
from fetch import OutOfReach, python_package

PICTURES, PER_PICTURE, GLOSSES = 60, 4, 240


def write_vqa(output: Path) -> None:
    with zipfile.ZipFile(python_package(*PACKAGE, SHA256)) as archive:
        inside = "easy_vqa/data/train"
        taken: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads(archive.read(f"{inside}/questions.json")):
            taken.setdefault(int(image), []).append((question, answer))
        (output / "images").mkdir(parents=True, exist_ok=True)
        with (output / "vqa.jsonl").open("w") as rows:
            for image in sorted(taken)[:PICTURES]:
                (output / f"images/{image}.png").write_bytes(archive.read(f"{inside}/images/{image}.png"))
                # open questions first: most are answered by yes or no
                asked = sorted(taken[image], key=lambda pair: pair[1] in ("yes", "no"))[:PER_PICTURE]
                for question, answer in asked:
                    row = {"image": f"images/{image}.png", "question": question, "answer": answer}
                    rows.write(json.dumps(row) + "\n")


def write_glosses(package: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        nouns = next(Path(folder).rglob("data.noun")).read_text().splitlines()
    entries = [line for line in nouns if not line.startswith("  ")]  # the licence stands before them
    with (output / "glosses.jsonl").open("w") as rows:
        for number in range(GLOSSES):
            fields, gloss = entries[number * len(entries) // GLOSSES].split(" | ", 1)
            word = fields.split()[4].replace("_", " ")
            rows.write(json.dumps({"prompt": f"What does {word!r} mean?", "completion": gloss.strip()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tests' sample of real rows.", allow_abbrev=False)
    parser.add_argument("--wordnet", type=Path, required=True, help="the Debian package wordnet-base")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; made when missing")
    options = parser.parse_args()
    try:
        write_vqa(options.output)
        emoji_scenes.write(options.output, scenes=15, side=112, rows="emoji.jsonl")
        write_glosses(options.wordnet, options.output)
    except (OutOfReach, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
