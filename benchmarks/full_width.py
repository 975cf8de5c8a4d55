"""Both recipes at full width on a small machine: real widths, vocabularies, image tokens; two layers, random weights.

    python -m benchmarks.full_width llm    configs/llm_1_5b.yaml: Qwen2-72B's widths -> 1.5B's, V 152064 and 151936
    python -m benchmarks.full_width vlm    configs/vlm_2b.yaml: InternVL2-8B's widths -> 2B's, V 92553

The recipe runs 3 steps through the deepspeed launcher on 2 CPU ranks, ZeRO-3 for both models. The memory of all its
processes is read several times a second: a page that two share counts half in each, and pages of the weights' files,
which the kernel can drop, are told apart. A run that leaves the machine less than 1 GiB is killed.

In the run itself, at each step, the loss's own gradient tells the target: what it gives to the padded rows of the
student's head must be nothing, and what it gives to the others must be a softmax in fp64 over the tokenizer's ids.

One thing differs from a plain run. PyTorch's CPU back end, gloo, copies the result of an all-gather, which would double
each gathered matrix; here the ranks send their parts into the result in place. The numbers are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).parents[1]
LAYERS, STEPS, SHARD = 2, 3, 2**30
PICTURE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
PICTURE_TOKENS["video_token"] = "<quad>"

ZERO: dict[str, Any] = {  # nothing is fetched before it is needed, nothing is kept after
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_bucket_size": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
BF16 = {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def qwen2(hidden: int, inner: int, heads: int, rows: int, tied: bool) -> Any:
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=max(heads // 8, 2),
        num_hidden_layers=LAYERS, vocab_size=rows, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def internvl(hidden: int, inner: int, heads: int, rows: int, image_id: int) -> Any:
    config = InternVLConfig(
        text_config=LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=8,
            num_hidden_layers=LAYERS, vocab_size=rows, tie_word_embeddings=False,
        ),
        vision_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": LAYERS,
            "image_size": 448, "patch_size": 14, "attention_bias": True,
        },
        image_token_id=image_id, image_seq_length=256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        return InternVLForConditionalGeneration(config)


def write_model(model: Any, folder: Path, seed: int) -> None:
    """Random bf16 weights, a tensor at a time; a file holds about a GiB."""
    generator = torch.Generator().manual_seed(seed)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    total = number = 0

    def write() -> None:
        nonlocal number, total
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in shard.values())
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, like in model.state_dict().items():
        if name in tied:
            continue
        if shard and sum(tensor.nbytes for tensor in shard.values()) + like.numel() * 2 > SHARD:
            write()
        scale = like.dim() < 2 and name.endswith("weight")
        tensor = torch.empty(like.shape, dtype=torch.bfloat16)
        shard[name] = tensor.fill_(1.0) if scale else tensor.normal_(0.0, 0.02, generator=generator)
    write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)


def write_llm(folder: Path, divide: int) -> dict[str, Any]:
    """Teacher, student, and the data section of the recipe."""
    from real_tokenizers import qwen

    sizes = {
        "student": (1536 // divide, 8960 // divide, 12, 151936, True),
        "teacher": (8192 // divide, 29568 // divide, 64, 152064, False),
    }
    tokenizer = qwen()
    (folder / "tokens").write_text(str(len(tokenizer)))
    for seed, (name, size) in enumerate(sizes.items()):
        write_model(qwen2(*size), folder / name, seed)
        tokenizer.save_pretrained(folder / name)
    glosses = (ROOT / "data" / "sample" / "glosses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in glosses]
    texts = [{"text": f"{row['prompt']} {row['completion']}."} for row in rows]
    return {"train": [write_rows(folder / "rows.jsonl", texts) | {"format": "text"}], "max_length": 128}


def write_vlm(folder: Path, divide: int) -> dict[str, Any]:
    from real_tokenizers import qwen

    sizes = {"student": (2048 // divide, 8192 // divide, 16), "teacher": (4096 // divide, 14336 // divide, 32)}
    tokenizer: Any = qwen(92553, PICTURE_TOKENS)
    (folder / "tokens").write_text(str(len(tokenizer)))
    template = tokenizer.chat_template.replace("<image>", PICTURE_TOKENS["context_image_token"] + "\\n")
    square: Any = {"size": {"height": 448, "width": 448}}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**square, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer=tokenizer, video_processor=InternVLVideoProcessor(**square), image_seq_length=256,
        chat_template=template,
    )  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids(PICTURE_TOKENS["context_image_token"])
    for seed, (name, size) in enumerate(sizes.items()):
        write_model(internvl(*size, len(tokenizer), image_id), folder / name, seed)
        processor.save_pretrained(folder / name)
    Image.effect_noise((448, 448), 80).convert("RGB").save(folder / "picture.png")  # a tile
    part = {"type": "image", "image": "picture.png"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [part, part, {"type": "text", "text": f"What is number {i}?"}]},
                {"role": "assistant", "content": f"Number {i} is noise in two pictures, which tell nothing at all."},
            ]
        }
        for i in range(8)
    ]
    return {"train": [write_rows(folder / "rows.jsonl", rows) | {"format": "messages"}]}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file)}


def write_overrides(folder: Path, data: dict[str, Any], optim: str) -> None:
    """What differs from the recipe: paths, ZeRO-3, all of the student in bf16, few and short rows."""
    engine = {"zero_optimization": ZERO, "zero_allow_untested_optimizer": True, "bf16": BF16}
    automatic = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size")
    engine |= dict.fromkeys((*automatic, "train_micro_batch_size_per_gpu"), "auto")
    overrides = {
        "student": {"path": str(folder / "student"), "dtype": "bfloat16"},
        "teacher": {"path": str(folder / "teacher"), "zero_stage": 3, "deepspeed": {"zero_optimization": ZERO}},
        "data": data,
        "objective": {"memory": 64.0},
        "training": {
            "output_dir": str(folder / "run"), "deepspeed": engine, "max_steps": STEPS, "logging_steps": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0,
            "optim": optim, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        },
    }  # fmt: skip
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))


# -- in each rank --------------------------------------------------------------------------------------------------


class _Done:
    def wait(self, **_: Any) -> None:
        pass


def gather_in_place(
    _: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> _Done:
    """An all-gather by broadcasts into the result."""
    rank = torch.distributed.get_rank(group)
    for source, part in enumerate(output_tensor.view(torch.distributed.get_world_size(group), -1)):
        if source == rank:
            part.copy_(input_tensor.view(-1))
        torch.distributed.broadcast(part, group=group, group_src=source)
    return _Done()


def masses(hidden_NH: Tensor, head: Any, target: Any, objective: Any, t: float, tokens: int) -> dict[str, float]:
    """What the student and its target give to the rows of its head that are no token, at one position.

    The gradient in a bias is the student's probabilities minus the target's, rounded to bf16.
    """
    from vlm_taid.objectives import HiddenSignal, linear_distillation

    at = slice(len(hidden_NH) // 2, len(hidden_NH) // 2 + 1)
    hidden_1H, target = hidden_NH[at].detach(), HiddenSignal(target.hidden_NG[at], target.head)
    bias_V = torch.zeros(head.weight.shape[0], requires_grad=True)
    head = replace(head, weight=head.weight.detach(), bias=bias_V)
    with torch.enable_grad():
        linear_distillation(hidden_1H, head, target, objective, t=t).loss_N.sum().backward()
    assert bias_V.grad is not None

    def fp64_logits(hidden_1H: Tensor, weight_VH: Tensor) -> Tensor:
        tiles = (weight_VH[at : at + 512].double() @ hidden_1H[0].double() for at in range(0, len(weight_VH), 512))
        return torch.cat(list(tiles))

    student_V = fp64_logits(hidden_1H, head.weight)
    teacher_V = fp64_logits(target.hidden_NG, target.head.weight)
    student_V, logits_V = student_V.softmax(-1), student_V
    target_V = student_V - bias_V.grad.double()
    mixed_C = ((1.0 - t) * logits_V[:tokens] + t * teacher_V[:tokens]).softmax(-1)
    return {
        "student": float(student_V[tokens:].sum()),
        "teacher_uncut": float(teacher_V.softmax(-1)[tokens:].sum()),
        "target": float(target_V[tokens:].abs().sum()),
        "target_share": float((target_V / student_V)[tokens:].abs().max()) if tokens < len(student_V) else 0.0,
        "target_off": float((target_V[:tokens] - mixed_C).abs().sum()),
    }


def rank() -> int:
    """The command in one rank, which writes down the padded rows' masses."""
    from deepspeed.comm.torch import TorchBackend

    import vlm_taid.forward as forward
    from vlm_taid.cli import main

    TorchBackend.all_gather_into_tensor = gather_in_place  # pyright: ignore[reportAttributeAccessIssue]
    folder, real = Path(os.environ["FULL_WIDTH"]), forward.linear_distillation
    tokens = int((folder / "tokens").read_text())

    def told(hidden_NH: Tensor, head: Any, target: Any, objective: Any, **call: Any) -> Any:
        if len(hidden_NH):
            found = masses(hidden_NH, head, target, objective, call["t"], tokens)
            sizes = {"rows": head.weight.shape[0], "teacher_rows": target.head.weight.shape[0], "tokens": tokens}
            with open(folder / f"masses{os.environ['RANK']}.jsonl", "a") as file:
                file.write(json.dumps(found | sizes) + "\n")
        return real(hidden_NH, head, target, objective, **call)

    forward.linear_distillation = told
    return main()


# -- around them ---------------------------------------------------------------------------------------------------


def memory(process: psutil.Process) -> tuple[list[float], list[float]]:
    """GiB of a process and of each of its children: all of it, and without pages of files."""
    whole, kept = [], []
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (OSError, psutil.Error):  # it has ended
            continue
        kib = {line.split()[0]: int(line.split()[1]) for line in lines}
        whole.append(kib["Pss:"] / 2**20)
        kept.append((kib["Pss:"] - kib["Pss_File:"]) / 2**20)
    return whole, kept


def shared_memory() -> float:
    return psutil.disk_usage("/dev/shm").used / 2**30


def watch(process: psutil.Popen, floor: float) -> Iterator[tuple[float, float, list[float]]]:
    """GiB in all, GiB without files, and those of each process; ends a run that leaves less than ``floor`` GiB."""
    before = shared_memory()
    while process.poll() is None:
        beside = max(shared_memory() - before, 0.0)
        whole, kept = memory(process)
        if psutil.virtual_memory().available < floor * 2**30:
            for victim in [*process.children(recursive=True), process]:
                victim.kill()
            held = ", ".join(f"{one:.2f}" for one in kept)
            sys.exit(f"killed: the machine had less than {floor:g} GiB left, and the processes held {held} GiB")
        yield sum(whole) + beside, sum(kept) + beside, kept
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=("llm", "vlm"))
    parser.add_argument("--divide", type=int, default=1, help="divide the decoders' widths, to try the script")
    parser.add_argument("--optim", default="adamw_torch", help="training.optim (default: adamw_torch)")
    parser.add_argument("--floor", type=float, default=1.0, help="GiB that must stay free (default: 1)")
    parser.add_argument("--folder", type=Path, help="keep models and run here, and use models that are here again")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "data"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        recipe = {"llm": "llm_1_5b", "vlm": "vlm_2b"}[given.pair]
        measure(folder, ROOT / "configs" / f"{recipe}.yaml", given)


def prepare(folder: Path, given: argparse.Namespace) -> None:
    for name in ("student", "teacher"):
        (folder / name).mkdir(parents=True)
    write = write_llm if given.pair == "llm" else write_vlm
    write_overrides(folder, write(folder, given.divide), given.optim)


def measure(folder: Path, recipe: Path, given: argparse.Namespace) -> None:
    overrides = folder / "overrides.yaml"
    if not overrides.exists():
        prepare(folder, given)
    for old in folder.glob("masses*"):
        old.unlink()
    shutil.rmtree(folder / "run", ignore_errors=True)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module", "benchmarks.full_width"]
    command = [*launcher, "distill", "--config", str(recipe), "--config", str(overrides)]
    environment = os.environ | {
        "FULL_WIDTH": str(folder),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
    }
    with open(folder / "log", "w") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        began, samples = time.monotonic(), list(watch(process, given.floor))
    if process.returncode != 0:
        sys.exit((folder / "log").read_text()[-5000:])
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    told = [json.loads(line) for file in sorted(folder.glob("masses*")) for line in file.read_text().splitlines()]
    kept = max(samples, key=lambda sample: sample[1])
    padded = told[0]["rows"] > told[0]["tokens"]
    report = {
        "pair": given.pair if given.divide == 1 else f"{given.pair}, widths divided by {given.divide}",
        "rows": [told[0]["rows"], told[0]["teacher_rows"]],
        "tokens": told[0]["tokens"],
        "answer_tokens": [step["answer_tokens"] for step in steps],
        "seconds_a_step": [round(step["answer_tokens"] / step["answer_tokens_per_second"], 1) for step in steps],
        "seconds": round(time.monotonic() - began),
        "peak_GiB": round(max(sample[0] for sample in samples), 2),
        "peak_without_files_GiB": round(kept[1], 2),
        "its_processes_GiB": [round(one, 2) for one in kept[2]],
        "losses": [step["loss"] for step in steps],
        "padded_mass_of_target": max(one["target"] for one in told),
        "padded_mass_of_student": [one["student"] for one in told if padded],
        "padded_rows_share_of_target": max(one["target_share"] for one in told),
        "padded_mass_of_teacher_uncut": told[0]["teacher_uncut"],
        "target_off_fp64": max(one["target_off"] for one in told),
    }
    print(json.dumps(report))
    assert len(steps) == STEPS and len(told) == 2 * STEPS
    assert all(one["target_share"] < 2**-8 for one in told)  # bf16's rounding of the gradient
    assert report["target_off_fp64"] < 2**-8


if __name__ == "__main__":
    sys.exit(rank() if "LOCAL_RANK" in os.environ else main())
