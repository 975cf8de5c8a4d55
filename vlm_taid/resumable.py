"""ResumableTrainer: transformers' Trainer whose runs can be killed at any moment and go on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import PARTIAL, publish

STATE = "DistillationState"  # the trainer's own place in TrainerState.stateful_callbacks


class ResumableTrainer(Trainer, ABC):
    """Writes whole checkpoints, stops on SIGTERM, and keeps every log line in ``metrics.jsonl``.

    A subclass says what its own state is (plain numbers and strings: they go into ``trainer_state.json``) and sets
    ``stopped`` on all ranks alike when any rank's ``stop_requested`` is set.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.stop_requested = self.stopped = False
        self._saving = False
        self.add_callback(_EndOfStep(self))

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit, equal on all ranks; every rank must call."""

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes what ``own_state`` gave."""

    def save_rank_state(self, checkpoint: Path) -> None:
        """Writes what this rank alone has into a checkpoint's folder; every rank is called."""

    def load_rank_state(self, checkpoint: Path) -> None:
        """Takes what ``save_rank_state`` wrote."""

    def training_begins(self) -> None:
        """Called when the state is there, before the first step."""

    def end_of_step(self) -> None:
        """Called after each optimizer step."""

    def stop_on_sigterm(self) -> None:
        """From now on SIGTERM ends training after the step in hand, with a checkpoint."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_requested", True))

    @property
    def metrics_file(self) -> Path:
        return Path(str(self.args.output_dir)) / "metrics.jsonl"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")

    def store_state(self) -> None:
        """Puts the trainer's own state into TrainerState; every rank must call."""
        states: Any = self.state.stateful_callbacks
        states[STATE] = {"args": {}, "attributes": self.own_state()}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(values, "sum")
        return total

    def create_accelerator_and_postprocess(self) -> None:
        shared = PartialState._shared_state
        if self.args.fsdp and shared["distributed_type"] == DistributedType.MULTI_CPU:
            # accelerate turns FSDP on for accelerators alone; on CPUs it would be DDP without a word
            shared["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _init_training_state(
        self, max_steps: Any, steps_per_epoch: Any, epochs: Any, resume_from_checkpoint: Any, trial: Any
    ):
        found = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        states: Any = self.state.stateful_callbacks or {}
        if STATE in states:
            self.load_own_state(states[STATE]["attributes"])
        if resume_from_checkpoint is not None:
            self.load_rank_state(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            _keep_until(self.metrics_file, self.state.global_step)
        self.training_begins()
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if self.is_fsdp_enabled or not _take_weights(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.accelerator.is_fsdp2:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # as accelerate does, but not strictly: a tower's layers that are never run have no state
        options = StateDictOptions(full_state_dict=True, strict=False)
        model: Any = self.model
        optimizer: Any = self.optimizer
        state = torch.load(Path(checkpoint) / "optimizer.bin", map_location="cpu", mmap=True, weights_only=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not _take_weights(self.model, best):
            super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # resumed from the last step: only the saving is left
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, PARTIAL) if self._saving else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the checkpoint beside and renames it when it is whole."""
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self.store_state()
        if self.args.should_save:
            shutil.rmtree(run / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit, self._saving = self.args.save_total_limit, None, True
        try:
            super()._save_checkpoint(model, trial)
            self.save_rank_state(run / PARTIAL / name)
        finally:
            self.args.save_total_limit, self._saving = limit, False
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and PARTIAL in Path(best).parts:
            self.state.best_model_checkpoint = str(run / Path(best).name)
        if self.args.should_save:
            beside = run / PARTIAL / name
            self.state.save_to_json(str(beside / "trainer_state.json"))
            publish(beside, run / name, self.accelerator.num_processes)
            beside.parent.rmdir()
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_of_step()
        if self.trainer.stopped:
            control.should_save = control.should_training_stop = True
        return control


def _take_weights(model: Any, checkpoint: str) -> bool:
    """Loads a whole model's weights by from_pretrained; False for a checkpoint of adapters alone.

    The base class reads the file as it is and passes over tensors whose names differ from the model's, as those of
    vision-language models do: it would go on from the student's first weights.
    """
    if not (Path(checkpoint) / "config.json").is_file():
        return False
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return True


def _keep_until(metrics: Path, step: int) -> None:
    """Drops the log lines of steps that a resumed run makes again."""
    if metrics.is_file():
        kept = []
        for line in metrics.read_text().splitlines() if step else []:
            with suppress(ValueError):  # a killed run may have written half a line
                kept += [line] if json.loads(line).get("step", 0) <= step else []
        metrics.write_text("".join(line + "\n" for line in kept))
