"""The command, with every rank writing after each optimizer step what it holds.

That is t and momentum, a sum over its weights, and under ZeRO-3 the bytes that it holds of student and teacher.
"""

import json
import sys
from pathlib import Path

import torch

from vlm_taid.cli import main
from vlm_taid.trainer import DistillationTrainer


def memory(*tensors: torch.Tensor) -> int:
    """Bytes of the storages, each counted once: what is gathered counts beside the shard."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


real = DistillationTrainer.end_of_step


def told(trainer: DistillationTrainer) -> None:
    real(trainer)
    state = None if trainer.schedule is None else trainer.schedule.state_dict()
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    models = [trainer.model, getattr(trainer.teacher, "model", None)]
    sharded = [[p for p in model.parameters() if hasattr(p, "ds_tensor")] for model in models if model is not None]
    held = [sum(memory(p.ds_tensor, p.data) for p in found) for found in sharded if found]
    with open(Path(str(trainer.args.output_dir)) / f"rank{trainer.args.process_index}.jsonl", "a") as file:
        file.write(json.dumps({"schedule": state, "weights": weights, "held": held}) + "\n")


DistillationTrainer.end_of_step = told
sys.exit(main())
