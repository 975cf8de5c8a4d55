"""Distillation end to end for pairs of every kind, on real rows: distances that must vanish do, and training helps."""

import json

import pytest
import torch
import yaml

from tests import families, kinds, runs
from vlm_taid.data import ConversationDataset, DataOptions, SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.objectives import Head, HiddenSignal, Objective, linear_distillation
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.streams import PairedCollator, SharedVocabulary, StreamEncoder
from vlm_taid.teachers.live import hidden_at

PROJECTOR = {  # what makes the image tokens' embeddings, by family
    "llava": "multi_modal_projector.linear_2",
    "internvl": "multi_modal_projector.linear_2",
    "qwen2_5_vl": "visual.merger.mlp.2",
    "smolvlm": "connector.modality_projection.proj",
    "gemma3": "mm_input_projection_weight",
}
VQA, GLOSSES = kinds.SAMPLE / "vqa.jsonl", kinds.SAMPLE / "glosses.jsonl"


def blind_copies(family: str):
    """A student, and a teacher with its weights and more image tokens; no picture gets through their projectors.

    Their attention is weak (its output is scaled by 3e-4): image tokens dilute it, the more of them the more, and
    that difference is real. What is left depends on the token at a position and on nothing else.
    """
    student = load_model(ModelOptions(families.made(family))).eval()
    teacher = load_model(ModelOptions(families.made(family, **families.MORE_IMAGE_TOKENS[family]))).eval()
    zeroed = 0
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if PROJECTOR[family] in name:
                parameter.zero_()
                zeroed += 1
            elif "o_proj.weight" in name:
                parameter.mul_(3e-4)
            elif family == "gemma3" and "post_attention_layernorm" in name:
                parameter.fill_(
                    3e-4 - 1
                )  # a norm of attention's output, which undoes a scale; its factor is 1 + weight
    assert zeroed
    weights, own = student.state_dict(), teacher.state_dict()
    assert own.keys() == weights.keys()
    # a tower of larger pictures has more places; what it sees ends at the projector
    copied = {key: value for key, value in weights.items() if value.shape == own[key].shape}
    assert all("position_embedding" in key for key in weights.keys() - copied.keys())
    teacher.load_state_dict(copied, strict=False)
    return student, teacher


@pytest.mark.parametrize("family", PROJECTOR)
def test_a_copy_through_more_image_tokens_is_at_no_distance(family):
    student, teacher = blind_copies(family)
    folders = families.made(family), families.made(family, **families.MORE_IMAGE_TOKENS[family])
    encoders = [StreamEncoder(load_processor(folder)) for folder in folders]
    dataset = ConversationDataset([SourceOptions(str(VQA), "vqa")])
    collate = PairedCollator(*encoders, SharedVocabulary(*encoders), DataOptions(train=[]))
    batch = collate([dataset[i] for i in range(0, 240, 8)])
    assert batch["student"]["input_ids"].shape[1] < batch["teacher"]["input_ids"].shape[1]
    heads = Head.of(student), Head.of(teacher)

    def kl_N(shift):
        with torch.no_grad():
            mine_NH = hidden_at(student, batch["student"], batch["student_rows_N"])
            theirs_NG = hidden_at(teacher, batch["teacher"], batch["teacher_rows_N"] + shift)
            target = HiddenSignal(theirs_NG, heads[1])
            return linear_distillation(mine_NH, heads[0], target, Objective.named("fkl")).kl_N

    assert kl_N(0).max() < 1e-3
    assert kl_N(1).min() > 1e-3 and kl_N(-1).min() > 1e-3


RUNS = {
    "one processor": ("internvl", {}, "internvl", {"seed": 1}),
    "more image tokens": ("qwen2_5_vl", {}, "qwen2_5_vl", {"seed": 1, **families.MORE_IMAGE_TOKENS["qwen2_5_vl"]}),
    "another family": ("smolvlm", {}, "llava_next", {"seed": 1}),
    "another tokenizer": ("gemma3", {"tok": "sentencepiece"}, "mistral3", {"tok": "byte_level", "seed": 1}),
    "a far tokenizer": ("gemma3", {"tok": "byte_level"}, "mistral3", {"tok": "sentencepiece", "seed": 1}),
    "text alone": ("phi3", {}, "qwen2_5_vl", {"seed": 1}),
}


def trained(tmp_path, kind, **data):
    """The run's log lines, 20 steps."""
    student, mine, teacher, theirs = RUNS[kind]
    folders = [
        families.made(name, **{key: kinds.kind(value) if key == "tok" else value for key, value in options.items()})
        for name, options in ((student, mine), (teacher, theirs))
    ]
    text = student in families.TEXT_ONLY
    path, data_file = tmp_path / f"{data.get('pair', 'run')}.yaml", str(GLOSSES if text else VQA)
    options = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    recipe = runs.recipe_file(path, *folders, data_file, name="fkl", **options)
    content = yaml.safe_load(recipe.read_text())
    content["data"] |= data
    if text:
        content["data"]["train"][0]["columns"] = {"question": "prompt", "answer": "completion"}
    recipe.write_text(yaml.safe_dump(content))
    lines = (runs.here(recipe) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "kl" in line]


@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "a far tokenizer"])
def test_training_lowers_the_loss(tmp_path, kind):
    lines = trained(tmp_path, kind)
    assert len(lines) == 20
    first, last = (sum(line["kl"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.9 * first
    assert ("paired_share" in lines[0]) == (kind != "one processor")
    assert ("teacher_rest_mass" in lines[0]) == (kind == "another tokenizer")
    assert all(0 < line.get("teacher_rest_mass", 0.05) < 0.1 for line in lines)


def test_a_teacher_that_says_what_the_student_cannot_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"% of the teacher's probability is on tokens that the student's tokenizer"):
        trained(tmp_path, "a far tokenizer")


def test_identical_tokens_alone(tmp_path):
    both = trained(tmp_path, "another tokenizer")
    only = trained(tmp_path, "another tokenizer", pair="identical_tokens")
    assert {line["identical_next_share"] for line in only} == {1.0}
    assert only[0]["answer_tokens"] < both[0]["answer_tokens"] and both[0]["identical_next_share"] < 1.0
