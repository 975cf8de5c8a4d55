"""A whole optimizer step of TAID over two tokenizers, against autograd in fp64: the rest bucket, and what is logged."""

import json

import pytest
import torch
import yaml

from tests import families, kinds, runs
from vlm_taid.distillation import build_trainer
from vlm_taid.objectives import per_token
from vlm_taid.pretrained import ModelOptions, load_model
from vlm_taid.recipe import Recipe
from vlm_taid.teachers.live import hidden_at

RATE, T = 1.0, 0.3


def in_fp64(batch):
    return {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in batch.items()}


def buckets(logits_NV, columns_C, rest_R):
    return torch.cat([logits_NV[:, columns_C], logits_NV[:, rest_R].logsumexp(-1, keepdim=True)], -1)


def test_a_step_over_the_rest_bucket_is_fp64_autograds(tmp_path):
    folders = [
        families.made("gemma3", tok=kinds.kind("sentencepiece")),
        families.made("mistral3", tok=kinds.kind("byte_level"), seed=1),
    ]
    file = runs.recipe_file(
        tmp_path / "run.yaml", *folders, str(kinds.SAMPLE / "vqa.jsonl"), max_steps=1, optim="sgd", learning_rate=RATE,
        max_grad_norm=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    content = yaml.safe_load(file.read_text())
    content["objective"] = {"name": "taid", "t_start": T, "diagnostics": True}
    file.write_text(yaml.safe_dump(content))
    recipe = Recipe.load(file)
    trainer = build_trainer(recipe, recipe.arguments())
    rows, shared = trainer.train_dataset, trainer.collator.vocabulary
    batches = [trainer.collator([rows[i] for i in at]) for at in ((0, 1), (2, 3))]
    trainer.train()
    student, teacher = (load_model(ModelOptions(folder)).double() for folder in folders)
    values = []
    for batch in batches:
        hidden_NH = hidden_at(student, in_fp64(batch["student"]), batch["student_rows_N"])
        with torch.no_grad():
            hidden_NG = hidden_at(teacher, in_fp64(batch["teacher"]), batch["teacher_rows_N"])
            teacher_NV = teacher.get_output_embeddings()(hidden_NG)
        student_NV = student.get_output_embeddings()(hidden_NH)
        q_NB = buckets(student_NV, shared.student_columns_C, shared.student_rest_R)
        p_NB = buckets(teacher_NV, shared.teacher_columns_C, shared.teacher_rest_R).log_softmax(-1)
        outside_N = student_NV.logsumexp(-1) - q_NB.logsumexp(-1)
        ranked_NV = student_NV.softmax(-1).sort(-1).values
        values.append(
            torch.stack([
                per_token("taid", q_NB, p_NB, t=T) + outside_N,
                p_NB[:, -1].exp(),
                (p_NB.exp() * (p_NB - q_NB.log_softmax(-1))).sum(-1) + outside_N,
                -(p_NB.exp() * p_NB).sum(-1),
                torch.special.entr(ranked_NV).sum(-1),
                ranked_NV[:, -10:].sum(-1),
                ranked_NV[:, : ranked_NV.shape[1] // 5].sum(-1),
                ((p_NB.argmax(-1) == q_NB.argmax(-1)) & (p_NB.argmax(-1) < p_NB.shape[1] - 1)).double(),
            ])
        )  # fmt: skip
    mean = torch.cat(values, -1).mean(-1)
    mean[0].backward()

    log = next(line for line in trainer.state.log_history if "loss" in line)
    assert "student_entropy" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    names = ("loss", "teacher_rest_mass", "teacher_kl", "teacher_entropy", "student_entropy", "head_mass", "tail_mass",
             "top1_agreement")  # fmt: skip
    for name, value in zip(names, mean.tolist(), strict=True):
        assert log[name] == pytest.approx(value, rel=2e-4), name
    assert log["kl"] == pytest.approx(log["loss"], rel=1e-5) and log["teacher_kl"] > log["kl"]

    before, after = load_model(ModelOptions(folders[0])).state_dict(), trainer.model.state_dict()
    off = total = 0.0
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            step = after[name].double() - before[name].double()
            off += float((step + RATE * parameter.grad).square().sum())
            total += float((RATE * parameter.grad).square().sum())
    assert total > 0 and (off / total) ** 0.5 < 1e-4
