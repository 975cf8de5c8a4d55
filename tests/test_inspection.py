"""inspect: what it shows is what training would read, and a row that would be refused makes it exit 1."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests import families, runs
from tests.browser import Page, needs_chromium
from vlm_taid.cli import main
from vlm_taid.data import Conversation, ConversationDataset, Part, Turn
from vlm_taid.inspection import inspect_row, seen_pictures
from vlm_taid.inspection.predictions import Models
from vlm_taid.objectives import per_token
from vlm_taid.pairing import paired_collator
from vlm_taid.recipe import Recipe

WITH_PICTURES = [name for name in families.FAMILIES if name not in families.TEXT_ONLY]


def recipe_of(tmp_path, student, teacher, rows=3, **options) -> tuple[Path, Path]:
    data = families.vqa_rows(tmp_path / "data", rows=rows)
    path = runs.recipe_file(tmp_path / "run.yaml", student, teacher, data, **options)
    return path, Path(data)


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_pictures_are_what_the_processor_made(family, tmp_path):
    """A picture of four quarters comes back with each colour in its corner, whatever layout its pixels have."""
    path, _ = recipe_of(tmp_path, families.made(family), None, name="sft")
    encoder = paired_collator(Recipe.load(path)).student
    colours = [(200, 30, 60), (20, 60, 220), (250, 250, 250), (10, 160, 40)]
    picture = Image.new("RGB", (96, 96))
    for corner, colour in zip(itertools.product((0, 48), repeat=2), colours, strict=True):
        picture.paste(colour, (*corner, corner[0] + 48, corner[1] + 48))
    turns = (Turn("user", (Part(image=picture), Part("Which?"))), Turn("assistant", (Part("red"),)))
    batch = encoder.encode_batch([Conversation(turns, row="quarters")])
    assert not batch.refused
    seen = seen_pictures(encoder, batch.inputs)
    assert seen.images and not seen.note

    def whole(image: Image.Image) -> bool:
        places = itertools.product((3, image.width - 4), (3, image.height - 4))
        return all(
            max(abs(a - b) for a, b in zip(image.getpixel(place), colour, strict=True)) <= 8  # pyright: ignore
            for place, colour in zip(places, colours, strict=True)
        )

    assert any(map(whole, seen.images))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no path is wrapped


def test_pairs_counts_and_page(tmp_path, capsys):
    """Two token counts for a picture: the page's pairs are the collator's, image tokens are folded and counted."""
    more = families.made("qwen2_vl", **families.MORE_IMAGE_TOKENS["qwen2_vl"])
    path, data = recipe_of(tmp_path, families.made("qwen2_vl"), more)
    page = tmp_path / "streams.html"
    assert main(["inspect", "--config", str(path), "--rows", "2", "--html", str(page)]) == 0
    recipe = Recipe.load(path)
    collator = paired_collator(recipe)
    row, batch = inspect_row(ConversationDataset(recipe.data.train)[0], collator)
    assert batch is not None and row.student is not None and row.teacher is not None
    ids = batch["student"]["input_ids"][0].tolist()
    image_id = collator.student.processor.image_token_id
    assert row.student.image_tokens == ids.count(image_id) and row.teacher.image_tokens > row.student.image_tokens
    assert sum(piece.count for piece in row.student.pieces) == row.student.tokens == len(ids)
    numbers = [[p.pair for p in view.pieces if p.pair is not None] for view in (row.student, row.teacher)]
    assert numbers[0] == numbers[1] == list(range(len(batch["labels_N"])))
    html = page.read_text()
    assert f"× {row.student.image_tokens}<" in html and f"× {row.teacher.image_tokens}<" in html
    assert not re.search(r"(src|href)=.(?!data:)", html) and "@import" not in html and "url(" not in html
    assert html.count('tabindex="0"') == html.count("data-pair=") >= 4
    HTMLParser().feed(html)
    printed = capsys.readouterr().out
    assert f"{data}:1" in printed and "2 rows inspected, 0 of them" in printed and "shared tokens" in printed


@needs_chromium
def test_keys_reach_every_pair_and_its_partner(tmp_path):
    path, _ = recipe_of(tmp_path, families.made("qwen2_vl"), families.made("internvl"), rows=2)
    page = tmp_path / "streams.html"
    assert main(["inspect", "--config", str(path), "--rows", "2", "--html", str(page)]) == 0
    at = (
        "[[...document.querySelectorAll('.stream')].indexOf(document.activeElement.parentNode), "
        "+document.activeElement.dataset.pair, document.querySelectorAll('.lit').length]"
    )
    with Page(page, tmp_path / "profile") as shown:
        last = shown.js("document.querySelectorAll('.side')[1].querySelectorAll('[data-pair]').length") - 1
        went = []
        for key in (
            "Tab",
            "ArrowRight",
            "ArrowDown",
            "End",
            "ArrowRight",
            "ArrowUp",
            "ArrowLeft",
            "Home",
            "Tab",
            "Tab",
        ):
            shown.press(key)
            went.append(shown.js(at))
        # the page's first .stream is its legend
        places = [(1, 0), (1, 1), (2, 1), (2, last), (2, last), (1, last), (1, last - 1), (1, 0), (2, last), (3, 0)]
        assert went == [[*place, 2] for place in places]
        assert last > 1 and not shown.errors and shown.requests == [page.resolve().as_uri()]


@pytest.mark.parametrize(("family", "options"), [("pixtral", {}), ("smolvlm", {"split": True}), ("internvl", {})])
def test_a_picture_is_one_chip_with_its_marks(tmp_path, family, options):
    """Line breaks, tile numbers and frames are the picture's."""
    path, _ = recipe_of(tmp_path, families.made(family, **options), None, name="sft")
    collator = paired_collator(Recipe.load(path))
    pictures = [Part(image=Image.new("RGB", size, "red")) for size in ((64, 48), (48, 64))]
    turns = (Turn("user", (pictures[0], Part("and"), pictures[1], Part("?"))), Turn("assistant", (Part("red"),)))
    row, batch = inspect_row(Conversation(turns), collator)
    assert batch is not None and row.student is not None
    chips = [piece for piece in row.student.pieces if piece.kind == "image"]
    assert len(chips) == 2 and all(chip.marks > 0 for chip in chips)
    ids = batch["student"]["input_ids"][0].tolist()
    assert row.student.image_tokens == ids.count(collator.student.processor.image_token_id)
    assert sum(piece.count for piece in row.student.pieces) == len(ids)
    rest = "".join(piece.text for piece in row.student.pieces if piece.kind != "image")
    assert "and" in rest and not re.search(r"IMG|img|image>|row_|fake", rest)


def test_refused_rows_are_shown_and_exit_1(tmp_path, capsys):
    path, data = recipe_of(tmp_path, families.made("llava"), families.made("llava", seed=1))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["image"] = "gone.png"
    rows[1]["question"] *= 40
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "streams.html"
    options = ["--html", str(page), "--data.max_length", "80", "--data.on_bad_row", "error"]
    assert main(["inspect", "--config", str(path), *options]) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "gone.png" in printed and "max_length" in printed and "3 rows inspected, 2 of them would be" in printed
    assert page.read_text().count("row refused") == 2


def test_predictions_are_the_models(tmp_path):
    """KL and probabilities against dense fp64 ones from the models' own logits."""
    path, _ = recipe_of(tmp_path, families.made("llava"), families.made("llava", seed=1))
    recipe = Recipe.load(path)
    collator = paired_collator(recipe)
    row, batch = inspect_row(ConversationDataset(recipe.data.train)[0], collator)
    assert batch is not None
    models = Models(recipe, collator)
    found = models.predict(batch)
    logits = []
    for model, side in ((models.student, "student"), (models.teacher.model, "teacher")):
        with torch.no_grad():
            all_logits = model(**batch[side]).logits.flatten(0, 1)
        logits.append(all_logits[batch[f"{side}_rows_N"]].double())
    vocabulary = collator.vocabulary
    assert vocabulary is not None
    shared = [logits[0][:, vocabulary.student_columns_C], logits[1][:, vocabulary.teacher_columns_C]]
    kl_N = per_token("fkl", *shared)
    outside_N = logits[0].logsumexp(-1) - shared[0].logsumexp(-1)
    assert len(found) == row.pairs > 1
    for prediction, kl, outside, p_V in zip(found, kl_N, outside_N, logits[0].softmax(-1), strict=True):
        assert prediction.kl == pytest.approx(float(kl + outside), rel=1e-3, abs=1e-5)
        assert [p for _, p in prediction.student] == pytest.approx(p_V.topk(5).values.tolist(), rel=1e-3)


def test_without_a_teacher_and_models_wanted(tmp_path, capfd):
    path, _ = recipe_of(tmp_path, families.made("llava"), None, name="sft")
    assert main(["inspect", "--config", str(path), "--rows", "1"]) == 0
    assert main(["inspect", "--config", str(path), "--models"]) == 2
    assert "without one" in capfd.readouterr().err
    assert yaml.safe_load(path.read_text())["objective"]["name"] == "sft"
