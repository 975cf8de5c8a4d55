"""Several teachers: the mixture that the recipe names, through the whole trainer."""

import pytest
import torch
import yaml

from tests import families, runs
from vlm_taid.distillation import build_trainer
from vlm_taid.errors import InputError
from vlm_taid.objectives import FKL
from vlm_taid.pretrained import ModelOptions, load_model
from vlm_taid.recipe import Recipe

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    student = families.llava(folder / "student", seed=1, width=16)
    teachers = families.llava(folder / "one"), families.llava(folder / "two", seed=2, layers=3)
    data = families.vqa_rows(folder / "data")

    def recipe(file, chosen, **objective):
        """``chosen``: a path, or (path, weight) several times."""
        path = runs.recipe_file(folder / f"{file}.yaml", student, None, data, **SGD)
        content = yaml.safe_load(path.read_text())
        content["objective"] |= objective
        if isinstance(chosen, str):
            content["teacher"] = {"path": chosen, "dtype": "float32"}
        else:
            content["teachers"] = [{"path": one, "dtype": "float32", "weight": weight} for one, weight in chosen]
        path.write_text(yaml.safe_dump(content))
        return path

    return recipe, student, teachers


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_one_teacher_twice_is_that_teacher(trio, mix):
    recipe, student, (one, _) = trio
    run = runs.here(recipe(f"twice_{mix}", [(one, 1.0), (one, 3.0)], mix=mix))
    reference = runs.here(recipe("once", one) if mix == "logits" else recipe("once_more", one))
    assert runs.update_off(run, reference, student) < 1e-5
    again = Recipe.load(run / "recipe.yaml")
    assert [teacher.weight for teacher in again.teachers] == [1.0, 3.0] and again.objective.mix == mix
    assert (run / "README.md").read_text().count(f"- teacher: `{one}`") == 2


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_loss_is_the_mixtures_in_fp64(trio, mix):
    recipe, student, teachers = trio
    loaded = Recipe.load(recipe(f"mixed_{mix}", [(teachers[0], 1.0), (teachers[1], 3.0)], mix=mix))
    trainer = build_trainer(loaded, loaded.arguments())
    batch = trainer.collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        ours_N = trainer.paired_forward(trainer.model, batch, FKL(), None).kl_N

    def log_p(path):
        model = load_model(ModelOptions(path)).double()
        inputs = {
            key: value.double() if value.is_floating_point() else value for key, value in batch["student"].items()
        }
        with torch.no_grad():
            return model(**inputs).logits.flatten(0, 1)[batch["student_rows_N"]].log_softmax(-1)

    one_NV, two_NV = (log_p(path) for path in teachers)
    mixtures = {
        "logits": (0.25 * one_NV + 0.75 * two_NV).softmax(-1),
        "probabilities": 0.25 * one_NV.exp() + 0.75 * two_NV.exp(),
    }
    p_NV = mixtures[mix]
    expected_N = (p_NV * (p_NV.log() - log_p(student))).sum(-1)
    assert len(ours_N) > 8 and torch.allclose(ours_N.double(), expected_N, rtol=1e-4, atol=1e-5)


def test_lists_that_cannot_work_are_refused(trio, tmp_path):
    recipe, _, (one, two) = trio
    other = families.llama(tmp_path / "other")
    for chosen, objective, message in (
        ([(one, 1.0)], {}, "has one entry"),
        ([(one, 1.0), (two, 0.0)], {}, "positive weight"),
        (one, {"mix": "probabilities"}, "with several teachers alone"),
        ([(one, 1.0), (other, 1.0)], {}, "does not read rows as"),
    ):
        with pytest.raises(InputError, match=message):
            loaded = Recipe.load(recipe("refused", chosen, **objective))
            build_trainer(loaded, loaded.arguments())
