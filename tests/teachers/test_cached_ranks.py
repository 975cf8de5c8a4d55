"""A teacher on disk with two ranks: who writes it and who reads it makes no difference."""

import pytest
import torch
import yaml

from tests import runs
from tests.families import llama, vqa_rows
from vlm_taid.caching import cache
from vlm_taid.recipe import Recipe

MADE = ["--k", "8", "--coefficients", "16", "8", "--rows_per_shard", "3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A recipe with a given ZeRO stage of the student, and a cache by one process, of six shards."""
    folder = tmp_path_factory.mktemp("ranks")
    data = vqa_rows(folder / "data", images=False, rows=16)
    student, teacher = llama(folder / "student", seed=1), llama(folder / "teacher", width=48)

    def recipe(name, cached=None, **training):
        path = runs.recipe_file(folder / f"{name}.yaml", student, teacher, data, use_cpu=True, **training)
        if cached is not None:
            made = yaml.safe_load(path.read_text())
            made["teacher"]["cache"] = str(cached)
            path.write_text(yaml.safe_dump(made))
        return path

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launchers set them: the order of a sum depends on it
    one = cache(Recipe.load(recipe("one", per_device_train_batch_size=2)), folder / "cache", 8, 3, (16, 8))
    torch.set_num_threads(threads)
    return recipe, one, student


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage, launcher", [(0, "torchrun"), (3, "deepspeed")])
def test_two_ranks_write_what_one_writes_also_after_a_kill(text, zero_stage, launcher, tmp_path):
    recipe, one, _ = text
    more = {"zero_stage": 3, "deepspeed": runs.deepspeed_config(3)} if zero_stage else {}
    path, two = recipe(f"two{zero_stage}", per_device_train_batch_size=2, **more), tmp_path / "cache"
    arguments = ["cache", "--output", str(two), *MADE]
    runs.launched(path, launcher, lambda: (two / "cache.json").exists(), arguments=arguments)
    assert len(list(two.glob("rows-*.safetensors"))) < 6
    runs.launched(path, launcher, arguments=arguments)
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
    if zero_stage == 0:
        for file in one.iterdir():
            assert (two / file.name).read_bytes() == file.read_bytes(), file.name
    steps = {"max_steps": 2, "per_device_train_batch_size": 4}  # a sharded teacher's products are rounded otherwise
    found, expected = (
        runs.metrics(runs.here(recipe(f"from_{folder.parent.name}", folder, **steps)), "kl") for folder in (two, one)
    )
    assert len(found) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_students_of_every_zero_stage_read_it_alike(text):
    recipe, one, student = text
    steps = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5}
    reference = runs.here(recipe("whole", one, per_device_train_batch_size=4, **steps))
    for stage in (1, 3):
        settings = {"deepspeed": runs.deepspeed_config(stage), "per_device_train_batch_size": 2, **steps}
        run = runs.launched(recipe(f"zero{stage}", one, **settings), "deepspeed")
        assert runs.update_off(run, reference, student) < 1e-4, stage
