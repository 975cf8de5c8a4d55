"""Teachers in four and eight bits: what is quantised, how near its answers stay, and what is refused."""

import pytest
import torch
import yaml

from tests import families, runs
from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model
from vlm_taid.recipe import Recipe
from vlm_taid.teachers.live import LiveTeacher, TeacherOptions

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "family, bits",
    [(families.llama, "4bit"), (families.llama, "8bit"), (families.llava, "8bit")],
)
def test_linear_layers_are_quantised_and_the_head_is_not(family, bits, tmp_path):
    """bitsandbytes' four bits on a CPU need widths of a multiple of 32; the tiny tower has 16."""
    path = family(tmp_path, width=128)
    plain = load_model(ModelOptions(path))
    teacher = LiveTeacher(TeacherOptions(path, dtype="float32", quantize=bits), torch.device("cpu"))
    kind = bitsandbytes.nn.Linear4bit if bits == "4bit" else bitsandbytes.nn.Linear8bitLt
    inside = {name: module for name, module in teacher.model.named_modules() if isinstance(module, kind)}
    assert any(name.endswith("q_proj") for name in inside) and "lm_head" not in inside
    assert torch.equal(teacher.head.weight, plain.get_output_embeddings().weight)
    for name, module in inside.items():
        eye = torch.eye(module.in_features)
        found, expected = module(eye).T, plain.get_submodule(name).weight
        off = (found - (0 if module.bias is None else module.bias[:, None]) - expected).norm() / expected.norm()
        assert 0.0 < off < (0.12 if bits == "4bit" else 0.02), name  # NF4 of a Gaussian: 0.09
    batch = {"teacher": {"input_ids": torch.arange(3, 23)[None]}, "teacher_rows_N": torch.arange(20)}
    assert teacher.signal(batch).hidden_NG.isfinite().all()


def test_a_student_is_distilled_from_a_quantised_teacher(tmp_path):
    student, teacher = families.llama(tmp_path / "s", seed=1, width=16), families.llama(tmp_path / "t", width=128)
    data = families.vqa_rows(tmp_path / "data", rows=8, images=False)
    losses = []
    for quantize in (None, "4bit"):
        path = runs.recipe_file(tmp_path / f"{quantize}.yaml", student, teacher, data, max_steps=2, use_cpu=True)
        content = yaml.safe_load(path.read_text())
        content["teacher"]["quantize"] = quantize
        path.write_text(yaml.safe_dump(content))
        losses.append(runs.metrics(runs.here(path), "loss"))
    assert len(losses[1]) == 2 and losses[1] != losses[0]
    assert [loss for (loss,) in losses[1]] == pytest.approx([loss for (loss,) in losses[0]], rel=0.05)


def test_a_sharded_quantised_teacher_is_refused(tmp_path):
    path = runs.recipe_file(
        tmp_path / "r.yaml", "student", "teacher", "rows.jsonl", zero_stage=3, deepspeed=runs.deepspeed_config(3)
    )
    with pytest.raises(InputError, match="zero_stage to 0"):
        Recipe.load(path, ["--teacher.quantize", "8bit"])
