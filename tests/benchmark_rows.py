"""A few rows of each benchmark in the columns of its public data set, and answers that are right."""

from __future__ import annotations

import base64
import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

TEN = [{"answer": "red", "answer_id": number} for number in range(10)]
KIT = {"A": "dog", "B": "bird", "C": "cat", "D": "fish"}


def png(colour: str, size: int = 24) -> bytes:
    """A picture's file."""
    file = BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def base64_png(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSONL; pictures given as bytes become files beside it."""
    for number, row in enumerate(rows):
        for column, value in row.items():
            if isinstance(value, bytes):
                name = f"{path.stem}_{number}_{column}.png"
                path.with_name(name).write_bytes(value)
                row[column] = name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as VLMEvalKit's TSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def rows_of(name: str) -> tuple[list[dict[str, Any]], list[str], str]:
    """A benchmark's rows in its columns, a right answer to each, and the kind of file: jsonl or tsv."""
    question, image = "what color is it?", png("red")
    open_rows = [
        {"image": image, "question": question, "question_id": number, "answers": [entry["answer"] for entry in TEN]}
        for number in range(2)
    ]
    kit = [
        {"index": number, "image": base64_png("red"), "question": question, **KIT, "answer": "B", "category": "a",
         "l2-category": "x", "split": "dev", "hint": "" if number else "look"}
        for number in range(2)
    ]  # fmt: skip
    table: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
        "vqav2": (
            [row | {"answers": TEN, "answer_type": "other"} for row in open_rows], ["red"] * 2, "jsonl",
        ),
        "textvqa": (open_rows, ["Red."] * 2, "jsonl"),
        "okvqa": ([row | {"question_type": "one"} for row in open_rows], ["red"] * 2, "jsonl"),
        "vizwiz": (open_rows, ["red"] * 2, "jsonl"),
        "gqa": ([{"image": image, "question": question, "answer": "red", "imageId": "n1"}] * 2, ["Red."] * 2, "jsonl"),
        "docvqa": (
            [{"image": image, "question": question, "answers": ["red", "dark red"], "questionId": str(number)}
             for number in range(2)], ["red", "dark red"], "jsonl",
        ),
        "infovqa": (
            [{"image": image, "question": question, "answers": ["12%"], "questionId": "1"}] * 2, ["12%"] * 2, "jsonl",
        ),
        "chartqa": (
            [{"image": image, "question": question, "answer": "100", "type": kind}
             for kind in ("human_test", "augmented_test")], ["104", "100"], "jsonl",
        ),
        "pope": (
            [{"image": image, "question": "is it red?", "answer": answer, "question_id": number, "category": category}
             for number, (answer, category) in enumerate([("yes", "random"), ("no", "popular"), ("yes", "popular")])],
            ["Yes, it is", "no", "yes"], "jsonl",
        ),
        "mme": (
            [{"image": image, "question": "is it red? Please answer yes or no.", "answer": answer,
              "question_id": "color/1.png", "category": "color"} for answer in ("Yes", "No")],
            ["Yes", "No."], "jsonl",
        ),
        "scienceqa": (
            [{"image": image, "question": question, "choices": list(KIT.values()), "answer": 1, "hint": "look"},
             {"image": None, "question": question, "choices": ["yes", "no"], "answer": 0, "hint": ""}],
            ["B", "A"], "jsonl",
        ),
        "ai2d": (
            [{"image": image, "question": question, "options": list(KIT.values()), "answer": "1"}] * 2,
            ["B.", "bird"], "jsonl",
        ),
        "mmstar": (
            [{"index": number, "image": image, "answer": "B", "category": "a", "l2_category": "x",
              "question": "what is it?\nOptions: A: dog, B: bird, C: cat, D: fish"} for number in range(2)],
            ["B", "a bird"], "jsonl",
        ),
        "mmmu_val": (
            [{"id": "validation_Art_1", "question": "<image 2> or <image 1>?", "options": "['<image 1>', 'bird']",
              "answer": "B", "question_type": "multiple-choice", "image_1": image, "image_2": png("blue"),
              "image_3": None, "subfield": "a"},
             {"id": "validation_Art_2", "question": "how many? <image 1>", "options": "[]", "answer": "7",
              "question_type": "open", "image_1": image, "image_2": None, "subfield": "b"}],
            ["B", "7"], "jsonl",
        ),
        "ocrbench": (
            [{"image": image, "question": question, "answer": ["red"], "dataset": "IIIT5K", "question_type": "Regular"},
             {"image": image, "question": "formula", "answer": ["x ^ 2"], "dataset": "HME100k",
              "question_type": "Handwritten Mathematical Expression Recognition"}],
            ["It says RED", "x^2"], "jsonl",
        ),
        "hallusionbench": (
            [{"category": "VD", "subcategory": "figure", "set_id": "0", "figure_id": "1", "question_id": str(number),
              "visual_input": "1", "question": "is it red?", "gt_answer": answer, "image": image}
             for number, answer in enumerate("10")],
            ["yes", "No."], "jsonl",
        ),
        "mathvista": (
            [{"pid": "1", "query": "Hint: give a letter.\nQuestion: what is it?", "question": "what is it?",
              "choices": ["3/11", "8/11"], "answer": "8/11", "question_type": "multi_choice", "answer_type": "text",
              "precision": None, "decoded_image": image, "image": "images/1.jpg"},
             {"pid": "2", "query": "how many?", "question": "how many?", "choices": None, "answer": "14",
              "question_type": "free_form", "answer_type": "integer", "precision": None, "decoded_image": image,
              "image": "images/2.jpg"}],
            ["(B) 8/11", "14"], "jsonl",
        ),
        "mmvet": (
            [{"question_id": f"v1_{number}", "image": image, "question": question, "answer": "red<AND>square",
              "capability": "rec"} for number in range(2)],
            ["a red square"] * 2, "jsonl",
        ),
    }  # fmt: skip
    for code in ("en", "cn"):
        turned = kit[0] | {"index": 1_000_000, "image": "0", "A": "fish", "D": "dog", "B": "cat", "C": "bird",
                           "answer": "C"}  # fmt: skip
        table[f"mmbench_{code}_v11"] = ([*kit, turned], ["B", "B. bird", "C"], "tsv")
    return table[name]


def write(name: str, folder: Path) -> tuple[str, list[str]]:
    """The benchmark's file, and right answers."""
    rows, answers, kind = rows_of(name)
    rows = [dict(row) for row in rows]
    path = folder / f"{name}.{kind}"
    return (write_tsv if kind == "tsv" else write_jsonl)(path, rows), answers
