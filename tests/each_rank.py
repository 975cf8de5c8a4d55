"""The command, with every rank writing after each optimizer step what it holds.

That is t and momentum, a sum over its weights, and under ZeRO-3 the bytes that it holds of student and teacher;
in a file of their own, the names of the rows of each micro-batch.
"""

import json
import sys
from pathlib import Path

import torch

from vlm_taid.cli import main
from vlm_taid.streams import PairedCollator
from vlm_taid.trainer import DistillationTrainer


def memory(*tensors: torch.Tensor) -> int:
    """Bytes of the storages, each counted once: what is gathered counts beside the shard."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


end_of_step, batch_samples, collated = (
    DistillationTrainer.end_of_step,
    DistillationTrainer.get_batch_samples,
    PairedCollator.__call__,
)


def with_names(collator: PairedCollator, rows):
    batch = collated(collator, rows)
    batch["names"] = [row.row for one in rows for row in (one if isinstance(one, list) else [one])]
    return batch


def kept(trainer: DistillationTrainer, *args):
    batches, tokens = batch_samples(trainer, *args)
    trainer.names = [batch["names"] for batch in batches]
    return batches, tokens


def told(trainer: DistillationTrainer) -> None:
    end_of_step(trainer)
    state = None if trainer.schedule is None else trainer.schedule.state_dict()
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    models = [trainer.model, getattr(trainer.teacher, "model", None)]
    sharded = [[p for p in model.parameters() if hasattr(p, "ds_tensor")] for model in models if model is not None]
    held = [sum(memory(p.ds_tensor, p.data) for p in found) for found in sharded if found]
    write(trainer, "rank", {"schedule": state, "weights": weights, "held": held})
    write(trainer, "rows", {"step": trainer.state.global_step, "rows": trainer.names})


def write(trainer: DistillationTrainer, kind: str, line: dict) -> None:
    with open(Path(str(trainer.args.output_dir)) / f"{kind}{trainer.args.process_index}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


DistillationTrainer.end_of_step, DistillationTrainer.get_batch_samples = told, kept
PairedCollator.__call__ = with_names
sys.exit(main())
