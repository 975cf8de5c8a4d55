"""Coloured squares, and a tiny LLaVA that is fitted to them on the spot until it answers every question right."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import families

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (250, 250, 250)}
STEPS = 400  # the most that are taken; about 100 are enough


def rows(folder: Path) -> Path:
    """``squares.jsonl``, 12 rows: the colour is asked for, or whether the square is red; pictures lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(12):
        colour = list(COLOURS)[index % len(COLOURS)]
        name = f"square{index}.png"
        Image.new("RGB", (24 + 4 * (index % 3), 32), COLOURS[colour]).save(folder / name)
        asked = index % 3 == 0
        lines.append({
            "question_id": index, "image": name,
            "question": "is there a red square?" if asked else "what color is the square?",
            "answer": ("yes" if colour == "red" else "no") if asked else colour,
            "category": "yes/no" if asked else "colour",
        })  # fmt: skip
    path = folder / "squares.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fitted(folder: Path) -> tuple[str, str]:
    """Writes the rows and a model that answers them all: (model folder, data file). Takes about three seconds."""
    data = rows(folder / "data")
    start = families.made("llava")
    model = AutoModelForImageTextToText.from_pretrained(start).train()
    processor = AutoProcessor.from_pretrained(start)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": line["question"]}]}],
            add_generation_prompt=True,
        )
        for line in lines
    ]
    pictures = [[Image.open(data.with_name(line["image"])).convert("RGB")] for line in lines]
    end = processor.tokenizer.eos_token
    options = {"images": pictures, "return_tensors": "pt", "padding": True, "padding_side": "right"}
    texts = [f"{prompt} {line['answer']}{end}" for prompt, line in zip(prompts, lines, strict=True)]
    inputs = processor(text=texts, **options)
    lengths = processor(text=prompts, **options)["attention_mask"].sum(1)
    places = torch.arange(inputs["input_ids"].shape[1])
    supervised = (places >= lengths[:, None]) & inputs["attention_mask"].bool()
    labels = torch.where(supervised, inputs["input_ids"], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    families.save(folder / "model", model.eval(), processor)
    return str(folder / "model"), str(data)
