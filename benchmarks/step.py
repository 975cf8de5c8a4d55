"""A whole distillation step of a vision-language pair at full width, against parts, the authors and TRL.

    python benchmarks/step.py --output benchmarks/step.jsonl

InternVL with Llama text models: student 2048 wide, teacher 4096, untied heads of 92553 rows, two layers everywhere,
random bf16 weights; one row of 4 tiles of 256 image tokens and 64 answer tokens. The parts: the teacher's backbone
forward, the student's forward and backward, and both heads' products on the answer rows alone. TRL is its
DistillationTrainer's loss (forward KL, the answer given) and backward, if TRL is installed: pip install
"vlm-taid[bench]". All run in one process. A first turn
gives the GiB at the peak, those beyond the two models. After it the process keeps its heap, as a GPU's allocator does:
new memory would be mapped page by page in each step, at a cost that depends on the machine and on who used it last.
Then the parts and ours take turns, and each rival repeats itself; after one round to warm up the least seconds of
``--turns`` count.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig

from vlm_taid.data import DataOptions
from vlm_taid.data.workers import keep_heap
from vlm_taid.objectives import Head, Objective, TAIDSchedule
from vlm_taid.streams import PairedBatch
from vlm_taid.teachers import LiveTeacher, TeacherOptions
from vlm_taid.teachers.live import hidden_at
from vlm_taid.trainer import DistillationArguments, DistillationTrainer

V, IMAGE_TOKEN, TILES, PROMPT, ANSWER = 92553, 92546, 4, 32, 64
STUDENT = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
TEACHER = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 2}


def model_of(sizes: dict[str, int]) -> Any:
    config = InternVLConfig(
        text_config=LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=V, tie_word_embeddings=False),  # pyright: ignore
        vision_config=VISION | {"image_size": 448, "patch_size": 14, "attention_bias": True},
        image_token_id=IMAGE_TOKEN, image_seq_length=256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    head: Any = model.get_output_embeddings()
    assert head.weight is not model.get_input_embeddings().weight
    return model


def one_batch() -> PairedBatch:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, IMAGE_TOKEN, (1, PROMPT + ANSWER), generator=generator)
    ids = torch.cat([torch.full((1, 256 * TILES), IMAGE_TOKEN), text], -1)
    pixels = torch.randn(TILES, 3, 448, 448, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    rows_N = torch.arange(ids.shape[1] - ANSWER - 1, ids.shape[1] - 1)
    return PairedBatch(
        student=inputs, teacher=inputs, student_rows_N=rows_N, teacher_rows_N=rows_N, labels_N=ids[0, rows_N + 1],
        stored={}, refused=[], num_rows=1,
    )  # fmt: skip


def contenders(student: Any, teacher: Any) -> dict[str, Callable[[], Any]]:
    batch = one_batch()
    live = LiveTeacher.__new__(LiveTeacher)  # a teacher that is in memory already
    live.options, live.model, live.wrapper, live.head = TeacherOptions(path="none"), teacher, teacher, Head.of(teacher)
    arguments = DistillationArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
    collator: Any = SimpleNamespace(vocabulary=None, shared=True, options=DataOptions(train=[]))
    options: dict[str, Any] = {"objective": Objective.named("taid"), "schedule": TAIDSchedule(), "collator": collator}
    trainer = DistillationTrainer(student, arguments, teacher=live, **options)
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    at = batch["student"], batch["student_rows_N"]
    hidden_NH, hidden_NG = (torch.randn(ANSWER, head.shape[1]).bfloat16() for head in heads)
    gradient_NH, gradient_NV = torch.randn(ANSWER, heads[0].shape[1]).bfloat16(), torch.randn(ANSWER, V).bfloat16()

    def teacher_backbone() -> None:
        with torch.no_grad():
            hidden_at(teacher, *at)

    def head_products() -> None:
        with torch.no_grad():
            torch.mm(hidden_NG, heads[1].T)
        (hidden_NH.requires_grad_() @ heads[0].T).backward(gradient_NV)

    def full_logits() -> None:
        inputs = {**batch["student"], "pixel_values": batch["student"]["pixel_values"].bfloat16()}
        logits = student(**inputs, use_cache=False).logits[0]
        with torch.no_grad():
            theirs = teacher(**inputs, use_cache=False).logits[0]
        target = torch.lerp(logits.detach(), theirs, 0.4).softmax(-1, dtype=torch.float32)
        per_token = -(target * F.log_softmax(logits, -1, dtype=torch.float32)).sum(-1)
        per_token[batch["student_rows_N"]].mean().backward()

    def trl(trainer: Any) -> None:
        inputs = batch["student"] | {"pixel_values": batch["student"]["pixel_values"].bfloat16()}
        parts = {"prompt": slice(None, -ANSWER), "completion": slice(-ANSWER, None)}
        for name, at in parts.items():
            inputs[f"{name}_ids"], inputs[f"{name}_mask"] = (inputs[k][:, at] for k in ("input_ids", "attention_mask"))
        trainer._compute_loss(student, inputs, torch.tensor(float(ANSWER)))[0].backward()

    rivals = {}
    if importlib.util.find_spec("trl"):
        from trl import DistillationTrainer as Rival

        rival = Rival.__new__(Rival)  # without its datasets and generation
        rival.teacher_model, rival.accelerator, rival._is_vlm, rival.model_kwarg_keys = (
            teacher,
            trainer.accelerator,
            True,
            (),
        )
        rival.beta, rival.temperature = 0.0, 1.0
        rival._forward_redirection = lambda wrapper, model, method, *a, **k: method(*a, **k)
        rivals["TRL"] = lambda: trl(rival)
    return {
        "teacher backbone": teacher_backbone,
        "student backbone": lambda: hidden_at(student, *at).backward(gradient_NH),
        "heads": head_products,
        "ours": lambda: trainer.training_step(student, batch, torch.tensor(float(ANSWER))),
        "full logits": full_logits,
        **rivals,
    }


def memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    student, teacher = model_of(STUDENT), model_of(TEACHER).requires_grad_(False).eval()
    runs = contenders(student, teacher)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}

    def measure(names: list[str]) -> None:
        for name in names:
            student.zero_grad(set_to_none=True)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before, began, cpu_began = memory("VmRSS"), time.perf_counter(), time.process_time()
            runs[name]()
            seconds = time.perf_counter() - began, time.process_time() - cpu_began
            found[name].append((*seconds, memory("VmHWM") - before))
            print(name, found[name][-1], file=sys.stderr, flush=True)

    measure(list(runs))
    keep_heap(2**31 - 1)
    parts, rivals = ("teacher backbone", "student backbone", "heads"), list(runs)[4:]
    for together in ([*parts, "ours"], *([rival] for rival in rivals)):  # of like memory
        for _ in range(1 + options.turns):
            measure(together)
    peaks = {name: turns[0][2] for name, turns in found.items()}
    best = {name: [min(values) for values in zip(*turns[2:], strict=True)] for name, turns in found.items()}
    lines = [
        {"what": name, "seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "GiB": round(peaks[name], 2)}
        for name, (wall, cpu, _) in best.items()
    ]
    for what, place in (("seconds", 0), ("cpu_seconds", 1)):
        total = sum(best[name][place] for name in parts)
        lines.append({"of the parts' sum": what} | {name: round(best[name][place] / total, 3) for name in
                                                    list(runs)[3:]})  # fmt: skip
    with options.output.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
