"""What a run leaves, what it logs, and the parts of the trainer that no other test holds."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import families, runs
from vlm_taid.distillation import build_trainer
from vlm_taid.objectives import TAIDSchedule
from vlm_taid.pretrained import ModelOptions, load_model, vision_towers
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import TeacherOptions
from vlm_taid.teachers.live import teacher_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    student, teacher = families.fast_vlm(folder / "student", seed=1, width=16), families.fast_vlm(folder / "teacher")
    data = families.vqa_rows(folder / "data")

    def recipe(file, **more):
        return runs.recipe_file(folder / f"{file}.yaml", student, teacher, data, **({"max_steps": 4} | more))

    return recipe, student


@pytest.fixture(scope="module")
def run(pair):
    return runs.here(pair[0]("run"))


def test_student_loads_with_plain_transformers_and_generates(run):
    model = AutoModelForImageTextToText.from_pretrained(run)
    processor = AutoProcessor.from_pretrained(run)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    from PIL import Image

    inputs = processor(text=text, images=Image.new("RGB", (64, 64)), return_tensors="pt", add_special_tokens=False)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    saved, loaded = runs.weights(run), model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_training_moved_the_weights(run, pair):
    before, after = runs.weights(pair[1]), runs.weights(run)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("vision_tower" in key for key in moved) and any("language_model" in key for key in moved)


def test_folder_is_complete(run):
    files = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "README.md", "metrics.jsonl", "trainer_state.json", "complete.json", "config.json"} <= files
    card = (run / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "2501.16937" in card and "t_start: 0.2" in card
    again = Recipe.load(run / "recipe.yaml")
    assert again.objective.t_start == 0.2 and again.training["max_steps"] == 4


def test_log_has_what_a_taid_run_shows(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    keys = {"loss", "kl", "t", "t_closed_form", "delta_t", "momentum", "answer_tokens_per_second", "grad_norm"}
    assert len(lines) == 4 and all(keys <= line.keys() for line in lines)
    schedule = TAIDSchedule(t_start=0.2, alpha=0.05, beta=0.9)
    assert [line["t_closed_form"] for line in lines] == [schedule.closed_form(step, 4) for step in range(4)]
    peaks = [line["peak_memory_gib"] for line in lines]
    assert peaks == sorted(peaks) and 0.2 < peaks[0] <= peaks[-1] < 64  # torch alone takes some 0.3 GiB
    assert lines[0]["t"] == 0.2 and lines[3]["t"] > lines[1]["t"] > 0.2


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_vision_towers_stay_in_eval_mode_unless_asked(pair, mode):
    recipe = Recipe.load(pair[0](f"towers_{mode}"), ["--student.tower_mode", mode])
    trainer = build_trainer(recipe, recipe.arguments())
    trainer.train()
    towers = vision_towers(trainer.model)
    assert len(towers) == 1 and type(towers[0]).__name__ == "TimmWrapperModel"
    assert towers[0].training is (mode == "train") and trainer.model.training


def test_batch_norm_tower_does_not_break_accumulation(tmp_path):
    """In eval mode BatchNorm keeps its statistics, so 2 x 2 rows are 1 x 4 rows."""
    student = families.fast_vlm(tmp_path / "student", seed=1, tower_args={"channels": [8, 8, 16, 16], "stem_width": 8})
    teacher, data = families.fast_vlm(tmp_path / "teacher"), families.vqa_rows(tmp_path / "data")
    more = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    one, two = (
        runs.here(
            runs.recipe_file(
                tmp_path / f"{steps}.yaml", student, teacher, data, **more,
                per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps,
            )
        )
        for steps in (1, 2)
    )  # fmt: skip
    assert runs.update_off(two, one, student) < 1e-5
    statistics = [key for key in runs.weights(student) if "running_mean" in key]
    assert statistics and all(torch.equal(runs.weights(student)[key], runs.weights(one)[key]) for key in statistics)


def test_bf16_autocast_run_keeps_fp32_logits(pair):
    """Autocast must not reach the loss: its values are those of the bf16 hidden states in fp32 products."""
    lines = [
        runs.metrics(runs.here(pair[0](f"bf16_{bf16}", bf16=bf16, max_steps=1)), "loss")[0][0] for bf16 in (False, True)
    ]
    assert lines[0] == pytest.approx(lines[1], rel=0.05) and lines[0] != lines[1]


def test_sft_is_the_same_path_without_a_teacher(pair):
    recipe = Recipe.load(pair[0]("no_teacher", name="sft"), ["--objective.diagnostics", "true"])
    trainer = build_trainer(recipe, recipe.arguments())
    assert trainer.teacher is None and trainer.schedule is None
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["student_entropy"] > 0 and log["head_mass"] > log["tail_mass"] > 0 and "teacher_kl" not in log


def test_sharded_teachers_config_has_no_optimizer():
    given = {
        "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "stage3_prefetch_bucket_size": 7},
    }  # fmt: skip
    config = teacher_config(TeacherOptions("x", zero_stage=3, deepspeed=given), torch.bfloat16)
    assert config == {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7}, "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True}, "fp16": {"enabled": False},
    }  # fmt: skip


def test_model_with_missing_tensors_is_refused(pair, tmp_path):
    from safetensors.torch import save_file

    from vlm_taid.errors import InputError

    source = pair[1]
    model = AutoModelForImageTextToText.from_pretrained(source)
    model.save_pretrained(tmp_path)
    weights = runs.weights(tmp_path)
    dropped = next(key for key in weights if "language_model" in key and "mlp" in key)
    del weights[dropped]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lack 1 tensors"):
        load_model(ModelOptions(str(tmp_path)))


def test_ctkd_learns_its_temperature_and_resumes_it(pair):
    whole = runs.here(pair[0]("ctkd", name="ctkd", save_strategy="steps", save_steps=2, save_total_limit=4))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    path = [line["temperature"] for line in lines if "temperature" in line]
    assert len(path) == 4 and path[1] != path[0]  # without strength at step 0, then away from where it began
    part = runs.here(pair[0]("ctkd_resumed", name="ctkd", resume=str(whole / "checkpoint-2")))
    resumed = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    assert [line["temperature"] for line in resumed if "temperature" in line] == path[2:]


@pytest.mark.parametrize("objective", [{"name": "dkd"}, {"name": "js", "ce_weight": 0.5, "temperature": 2.0}])
def test_baselines_of_the_paper_run_from_a_recipe(pair, objective):
    import yaml

    file = pair[0](f"baseline_{objective['name']}", name=objective["name"], max_steps=2)
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**recipe, "objective": objective}))
    lines = [json.loads(line) for line in (runs.here(file) / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
