"""Runs of the real command, in this process or under a real launcher, and comparisons of what they leave."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from vlm_taid.distillation import distill
from vlm_taid.pretrained import ModelOptions, load_model
from vlm_taid.recipe import Recipe

LIMIT = 240  # seconds for one launch


def deepspeed_config(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # threshold 0: every parameter is really sharded
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True} | dict.fromkeys(auto, "auto")


FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("torchrun", {}),
    "fsdp2": ("torchrun", {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP2}),
    **{f"zero{stage}": ("deepspeed", {"deepspeed": deepspeed_config(stage)}) for stage in (1, 2, 3)},
}
"""How a student is spread over ranks: the launcher, and what the recipe's ``training`` says."""


def recipe_file(
    path: Path, student: str, teacher: str | None, data: str, *, name="taid", zero_stage=0, **training
) -> Path:
    """A recipe that logs every step and saves nothing unless told to."""
    objective = {"name": name} | ({"t_start": 0.2, "alpha": 0.05, "beta": 0.9} if name == "taid" else {})
    recipe = {
        "student": {"path": student},
        "data": {"train": [{"path": data, "format": "vqa"}], "on_bad_row": "skip"},
        "objective": objective,
        "training": {
            "output_dir": str(path.parent / path.stem), "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "learning_rate": 0.01, "lr_scheduler_type": "constant", **training,
        },
    }  # fmt: skip
    if teacher is not None:
        recipe["teacher"] = {"path": teacher, "dtype": "float32", "zero_stage": zero_stage}
        if zero_stage == 3:  # as in deepspeed_config
            recipe["teacher"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    path.write_text(yaml.safe_dump(recipe))
    return path


def here(recipe: Path) -> Path:
    """The run in this process."""
    return distill(Recipe.load(recipe))


def free_port() -> str:
    """A port of this machine that nobody listens on.

    It is below those which the kernel hands out, so that no other run's socket takes it before its launcher does.
    """
    for _ in range(100):
        port = random.SystemRandom().randint(15_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("none of 100 ports of 127.0.0.1 can be listened on")


def command(
    recipe: Path,
    launcher: str | None,
    ranks: int = 2,
    module: str = "vlm_taid",
    arguments: Sequence[str] = ("distill",),
) -> list[str]:
    """The command line; torchrun's ranks, or those of ``module`` tests.each_rank, tell what they hold."""
    port = free_port()
    arguments = [*arguments, "--config", str(recipe)]
    binary = Path(sys.executable).parent
    if launcher == "deepspeed":
        told = f"--num_gpus {ranks} --master_port {port} --module {module}"
        return [str(binary / "deepspeed"), *told.split(), *arguments]
    if launcher == "torchrun":
        told = f"--nproc_per_node {ranks} --master_port {port} -m tests.each_rank"
        return [str(binary / "torchrun"), *told.split(), *arguments]
    return [sys.executable, "-m", "vlm_taid", *arguments]


def launched(
    recipe: Path,
    launcher: str | None,
    kill_when: Callable[[], bool] | None = None,
    ranks: int = 2,
    module: str = "vlm_taid",
    arguments: Sequence[str] = ("distill",),
) -> Path:
    """The run under a launcher (None: one process of its own); killed with SIGKILL when the condition holds.

    The PATH holds the environment's own commands alone: no compiler, so that nothing can need one.
    """
    log = recipe.with_suffix(".log")
    extensions = str(recipe.parent / "extensions")
    environment = os.environ | {"PATH": str(Path(sys.executable).parent), "TORCH_EXTENSIONS_DIR": extensions}
    with open(log, "w") as file:
        process = psutil.Popen(
            command(recipe, launcher, ranks, module, arguments), stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        end = time.monotonic() + LIMIT
        while process.poll() is None:
            if kill_when is not None and kill_when():
                for victim in [*process.children(recursive=True), process]:
                    victim.kill()
                process.wait()
                return output_of(recipe)
            assert time.monotonic() < end, f"no end after {LIMIT} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.02)
    assert kill_when is None, f"the run ended before it could be killed:\n{log.read_text()[-3000:]}"
    assert process.returncode == 0, log.read_text()[-20_000:]
    return output_of(recipe)


def output_of(recipe: Path) -> Path:
    return Path(yaml.safe_load(recipe.read_text())["training"]["output_dir"])


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def loaded(folder: Path | str) -> dict[str, torch.Tensor]:
    """The weights by the names of the loaded model: files may name them otherwise, under ZeRO-3 they do."""
    return load_model(ModelOptions(str(folder))).state_dict()


def metrics(run: Path, *keys: str) -> list[tuple]:
    """The training log lines that have the keys, as tuples."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines if all(key in line for key in keys)]


def update_off(run: Path, reference: Path, start: str) -> float:
    """How far a run's weight update is from the reference's, relative to the reference's update."""
    ours, theirs, before = loaded(run), loaded(reference), loaded(start)
    assert ours.keys() == theirs.keys()
    difference = sum((ours[key].double() - theirs[key].double()).square().sum() for key in theirs)
    update = sum((theirs[key].double() - before[key].double()).square().sum() for key in theirs)
    return float((difference / update).sqrt())
