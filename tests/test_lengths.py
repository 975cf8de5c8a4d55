"""Batches of rows of similar length: the same on every run, in every epoch another order, and resumable."""

import json
import random
from pathlib import Path

import torch

from tests import families, runs
from vlm_taid.distillation import distill
from vlm_taid.lengths import LengthGrouped
from vlm_taid.recipe import Recipe

LENGTHS = [int(7 + 500 * ((i * 0.618) % 1)) for i in range(1003)]


def order(epoch, seed=3):
    sampler = LengthGrouped(LENGTHS, 8, seed)
    sampler.epoch = epoch
    return list(sampler)


def test_order_is_a_function_of_seed_and_epoch():
    first = order(0)
    assert sorted(first) == list(range(1003)) and len(LengthGrouped(LENGTHS, 8, 3)) == 1003
    assert first == order(0) and first != order(1) and first != order(0, seed=4)


def test_blocks_are_of_similar_length():
    """A block is a micro-batch over all ranks: none waits long for another."""
    rows = order(2)
    blocks = [[LENGTHS[row] for row in rows[at : at + 8]] for at in range(0, 1000, 8)]
    padding = sum(max(block) * 8 - sum(block) for block in blocks) / sum(map(sum, blocks))
    shuffled = random.Random(0).sample(range(1003), 1003)
    plain = [[LENGTHS[row] for row in shuffled[at : at + 8]] for at in range(0, 1000, 8)]
    assert padding < 0.05 < 0.5 < sum(max(block) * 8 - sum(block) for block in plain) / sum(map(sum, plain))
    assert max(blocks[0]) == max(LENGTHS[row] for row in rows[:1000])  # what does not fit fails at the first step
    means = [sum(block) for block in blocks[1:]]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_run_goes_on_within_a_later_epoch(tmp_path):
    student = families.llama(tmp_path / "student", seed=1, width=16, attention_dropout=0.2)
    teacher = families.llama(tmp_path / "teacher")
    data = families.vqa_rows(tmp_path / "data", rows=26, images=False)
    more = {"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 9}
    more |= {"train_sampling_strategy": "group_by_length", "save_strategy": "steps"}
    more |= {"eval_strategy": "steps", "eval_steps": 6}

    def recipe(name, **changed):
        path = runs.recipe_file(tmp_path / f"{name}.yaml", student, teacher, data, **more, **changed)
        return Recipe.load(path, ["--data.validation", json.dumps([{"path": data, "format": "vqa"}])])

    whole = distill(recipe("whole"))
    lengths = list(Path(whole).glob("lengths-*.npy"))
    again = distill(recipe("resumed", resume=str(whole / "checkpoint-9")))
    assert lengths[0].name == next(again.glob("lengths-*.npy")).name
    ours, theirs = runs.weights(again), runs.weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert runs.metrics(again, "step", "loss", "t") == runs.metrics(whole, "step", "loss", "t")[-3:]
