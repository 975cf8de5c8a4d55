"""Every shipped recipe parses, and says of each key where its value comes from."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import llama
from vlm_taid.errors import InputError
from vlm_taid.recipe import Recipe

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = ["llm_1_5b", "vlm_2b", "vlm_2b_qwen", "instruct_tinyllama"]


def test_the_papers_recipes_are_there():
    assert set(PAPER) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = Recipe.load(path)
    config = recipe.training.get("deepspeed")
    assert config is None or json.loads(Path(config).read_text())["gradient_clipping"] == "auto"
    assert recipe.objective.objective().uses_teacher == (recipe.teacher is not None)


@pytest.mark.parametrize("name", PAPER)
def test_every_value_has_its_source(name):
    for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines():
        has_value = re.match(r"\s*(- )?[\w.]+: *[^\s#]", line)
        assert not has_value or "# " in line, line


def test_a_base_student_takes_the_teachers_vocabulary(tmp_path):
    file = ROOT / "data" / "teacher_vocabulary.py"
    specification = importlib.util.spec_from_file_location("teacher_vocabulary", file)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    student, teacher = llama(tmp_path / "student"), llama(tmp_path / "teacher", seed=1)
    base = AutoTokenizer.from_pretrained(student)
    base.chat_template = None
    base.save_pretrained(student)
    (tmp_path / "student" / "chat_template.jinja").unlink(missing_ok=True)
    longer = AutoTokenizer.from_pretrained(teacher)
    longer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    longer.save_pretrained(teacher)
    script.teacher_vocabulary(student, teacher, tmp_path / "out")
    made, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert made.get_output_embeddings().weight.shape[0] == len(longer) == len(base) + 1
    assert tokenizer.get_vocab() == longer.get_vocab() and tokenizer.chat_template == longer.chat_template
    before = AutoModelForCausalLM.from_pretrained(student).get_input_embeddings().weight
    assert made.get_input_embeddings().weight[: len(before)].equal(before)


def test_another_vocabulary_is_refused(tmp_path):
    file = ROOT / "data" / "teacher_vocabulary.py"
    specification = importlib.util.spec_from_file_location("teacher_vocabulary", file)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    student, teacher = llama(tmp_path / "student"), llama(tmp_path / "teacher")
    other = AutoTokenizer.from_pretrained(teacher).train_new_from_iterator(["completely other words 0123"] * 9, 330)
    other.save_pretrained(teacher)
    with pytest.raises(InputError, match="have other vocabularies"):
        script.teacher_vocabulary(student, teacher, tmp_path / "out")
