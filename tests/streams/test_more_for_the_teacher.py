"""The teacher may read and see more than the student: a system prompt of its own, more pixels, other settings."""

import pytest
import torch
import yaml

from tests import families, runs
from vlm_taid.cli import main
from vlm_taid.data import ConversationDataset
from vlm_taid.pairing import paired_collator
from vlm_taid.recipe import Recipe
from vlm_taid.streams import Answer

SYSTEM = "The picture holds one shape."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A family's student, its teacher with the same processor, and rows."""
    folder = tmp_path_factory.mktemp("more")
    made = {
        family: tuple(families.FAMILIES[family](folder / family / name, seed=seed) for seed, name in enumerate("st"))
        for family in ("qwen2_vl", "smolvlm", "llava", "gemma2")
    }
    return made, families.vqa_rows(folder / "data", rows=4)


def recipe_of(folders, tmp_path, family, **teacher):
    made, data = folders
    path = runs.recipe_file(tmp_path / "run.yaml", *made[family], data, max_steps=1, per_device_train_batch_size=2)
    content = yaml.safe_load(path.read_text())
    content["teacher"] |= teacher
    content["data"]["on_bad_row"] = "error"
    path.write_text(yaml.safe_dump(content))
    return path


def batch_of(path):
    recipe = Recipe.load(path)
    collator = paired_collator(recipe)
    rows = ConversationDataset(recipe.data.train)
    return collator, [rows[i] for i in range(2)]


MORE = {
    "system": ("qwen2_vl", {"system": SYSTEM}),
    "max_pixels": ("qwen2_vl", {"max_pixels": 112 * 112, "image_processor": {"min_pixels": 84 * 84}}),
    "tiles": ("smolvlm", {"image_processor": {"do_image_splitting": True}}),
}


@pytest.mark.parametrize("more", MORE)
def test_streams_are_not_shared_and_the_run_ends(folders, tmp_path, more):
    family, options = MORE[more]
    plain, rows = batch_of(recipe_of(folders, tmp_path, family))
    assert plain.shared
    path = recipe_of(folders, tmp_path, family, **options)
    collator, _ = batch_of(path)
    assert collator.teacher is not None and not collator.shared
    batch = collator(rows)
    assert batch["student"]["input_ids"].shape[1] != batch["teacher"]["input_ids"].shape[1]
    ids = [batch[name]["input_ids"].flatten() for name in ("student", "teacher")]
    next_ids = [ids[side][batch[f"{name}_rows_N"] + 1] for side, name in enumerate(("student", "teacher"))]
    assert torch.equal(*next_ids) and torch.equal(next_ids[0], batch["labels_N"])
    # the student reads what it read without the option
    assert torch.equal(batch["student"]["input_ids"], plain(rows)["student"]["input_ids"])
    assert main(["distill", "--config", str(path)]) == 0


def test_the_teachers_system_prompt_comes_before_the_rows_own(folders, tmp_path):
    collator, rows = batch_of(recipe_of(folders, tmp_path, "qwen2_vl", system=SYSTEM))
    assert collator.teacher is not None
    text = collator.teacher.encode(rows[0]).text
    assert text.count(SYSTEM) == 1 and SYSTEM not in collator.student.encode(rows[0]).text
    answers: list[Answer] = collator.teacher.encode(rows[0]).answers
    assert [answer.text for answer in answers] == [rows[0].turns[-1].text]


@pytest.mark.parametrize(
    "family, options, expected",
    [
        ("llava", {"max_pixels": 10_000}, "has no max_pixels"),
        ("llava", {"image_processor": {"sise": 3}}, "has no sise"),
        ("gemma2", {"system": SYSTEM}, "does not write the system prompt"),
        ("gemma2", {"max_pixels": 10_000}, "reads text alone"),
    ],
)
def test_what_the_teacher_cannot_take_is_refused(folders, tmp_path, capfd, family, options, expected):
    assert main(["distill", "--config", str(recipe_of(folders, tmp_path, family, **options))]) == 2
    error = capfd.readouterr().err
    assert expected in error and "Traceback" not in error
