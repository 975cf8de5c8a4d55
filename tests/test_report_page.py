"""The page in a browser: with keys alone, in light and dark; and token probabilities against plain transformers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import families
from tests.browser import Page, needs_chromium
from vlm_taid.cli import main
from vlm_taid.data import SourceOptions
from vlm_taid.evaluation import Results, Task
from vlm_taid.evaluation.readers import Row, image_sha256
from vlm_taid.evaluation.results import sample_line
from vlm_taid.evaluation.rows import Rows
from vlm_taid.report import MAX_BYTES, report
from vlm_taid.report.probabilities import Reader

COLORS = ["red", "green", "blue", "yellow", "teal", "gray", "black", "brown"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A file of questions, and what two models answered."""
    root = tmp_path_factory.mktemp("report")
    rows = []
    for number, color in enumerate(COLORS):
        pixels = np.random.default_rng(number).integers(0, 255, (400, 400, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{color}.png")
        rows.append({"image": f"{color}.png", "question": f"which colour </script> {number}?", "answer": color})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceOptions(path=str(root / "rows.jsonl"), format="vqa")
    task = Task("colors", source, metric="exact_match")
    for name, wrong in (("teacher", 0), ("student", 3)):
        lines = []
        for number, row in enumerate(Rows(source)):
            doc = {"question": row.turns[-1].text, "image": [image_sha256(image) for image in row.images]}
            answer = "pink" if number < wrong else COLORS[number]
            lines.append(sample_line(Row(number, doc, [COLORS[number]], None, "prompt", []), answer, task))
        results = Results.of(
            {"colors": task},
            {"colors": lines},
            {"colors": 8},
            model_name=name,
            config={"num_params": 1_000_000},
            chat_template=None,
            run={"date": "2026-01-01"},
        )
        results.save(root / "results")
    return root


@pytest.fixture(scope="module")
def models(root):
    return {name: families.fast_vlm(root / name, seed=seed) for seed, name in enumerate(("teacher", "student"))}


@pytest.fixture(scope="module")
def page(root, models):
    evaluations = [f"{name}={root / 'results' / name}" for name in models]
    asked = [f"{name}={path}" for name, path in models.items()]
    arguments = ["--evaluations", *evaluations, "--models", *asked, "--output", str(root / "report.html")]
    assert main(["report", *arguments]) == 0
    return root / "report.html"


def test_token_probabilities_are_the_models(root, models):
    """Against one plain forward in fp64 over the text that the chat template writes."""
    row = Rows(SourceOptions(path=str(root / "rows.jsonl"), format="vqa"))[2]
    model = AutoModelForImageTextToText.from_pretrained(models["student"], dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(models["student"])
    prompt = processor.apply_chat_template(row.messages(), add_generation_prompt=True)
    (tokens,) = Reader(models["student"]).read(row, ["a blue square"])
    text = prompt + "a blue square<|im_end|>"
    inputs = processor(text=text, images=row.images, return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        p_TV = model(**inputs).logits[0].softmax(-1)
    ids = inputs["input_ids"][0, -len(tokens) :]
    assert "".join(token.text for token in tokens) == "a blue square<|im_end|>" and len(tokens) > 2
    for token, i, p_V in zip(tokens, ids, p_TV[-len(tokens) - 1 : -1], strict=True):
        assert token.probability == pytest.approx(p_V[i].item(), rel=1e-4)
        best = p_V.topk(5)
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert processor.tokenizer.decode(best.indices[0]) in (token.top[0][0], "\ufffd")  # a part of a character


@needs_chromium
def test_the_page_by_keys_alone(page, tmp_path):
    with Page(page, tmp_path / "profile") as shown:
        shown.press("Tab")
        assert shown.js("document.activeElement.className") == "card"
        card = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        shown.press("ArrowRight", "ArrowRight", "ArrowLeft")
        assert shown.js(card) == 1
        shown.press("Enter")
        assert shown.js("document.getElementById('view').open")
        question = "document.getElementById('question').textContent"
        assert shown.js(question) == shown.js("cards[1].question") and "</script>" in shown.js(question)
        heads = shown.js("[...document.querySelectorAll('dialog th')].map(th => th.textContent)")
        assert heads == ["token", "teacher", "student"]
        tokens = "[...document.querySelectorAll('dialog tbody td:first-child')].map(td => td.textContent).join('')"
        assert shown.js(tokens) == shown.js("cards[1].choices[0].text") + "<|im_end|>"
        shown.js("document.querySelector('dialog input').focus()")
        shown.press("ArrowDown")  # the next answer
        assert shown.js(tokens) == shown.js("cards[1].choices[1].text") + "<|im_end|>"
        shown.js("document.getElementById('next').focus()")
        shown.press("ArrowRight")
        assert shown.js(question) == shown.js("cards[2].question")
        shown.press("Escape")
        shown.wait(f"!document.getElementById('view').open && {card} === 2")
        assert shown.requests == [page.resolve().as_uri()] and shown.errors == []


@needs_chromium
def test_dark_and_narrow(page, tmp_path):
    with Page(page, tmp_path / "profile", dark=True, size=(390, 844)) as shown:
        assert shown.js("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
        assert shown.js("document.documentElement.scrollWidth") <= 390  # tables scroll in themselves
        assert shown.js("[...document.images].every(i => i.alt.includes('to the question') && i.naturalWidth > 0)")
        label = "document.querySelector('figure svg').getAttribute('aria-label')"
        assert shown.js(label) == "Agreement: student, colors: 62.5 ± 18.3 %"


def test_three_long_runs_weigh_at_most_3_mb(root, tmp_path, models):
    keys = ("loss", "kl", "t", "t_closed_form", "grad_norm", "learning_rate", "answer_tokens_per_second")
    for run in "abc":
        (tmp_path / run).mkdir()
        values = np.random.default_rng(0).random((2000, len(keys) + 1))
        lines = [
            {"step": step, **dict(zip([*keys, "peak_memory_gib"], row, strict=True))} for step, row in enumerate(values)
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [tmp_path / run for run in "abc"]
    page = report(folders, tmp_path / "report.html", [root / "results" / name for name in models])
    assert 300_000 < page.stat().st_size <= MAX_BYTES
    for text in ("Loss: a from", "Peak memory: a from"):
        assert text in page.read_text()
