"""The command, with every rank writing after each optimizer step what it holds.

That is t and momentum, a sum over its weights, and under ZeRO-3 the bytes of student and teacher: [its own, the whole].
"""

import json
import sys
from pathlib import Path

from vlm_taid.cli import main
from vlm_taid.trainer import DistillationTrainer

real = DistillationTrainer.end_of_step


def told(trainer: DistillationTrainer) -> None:
    real(trainer)
    state = None if trainer.schedule is None else trainer.schedule.state_dict()
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    models = [trainer.model, getattr(trainer.teacher, "model", None)]
    sharded = [[p for p in model.parameters() if hasattr(p, "ds_tensor")] for model in models if model is not None]
    held = [
        [sum(p.ds_tensor.nbytes for p in found), sum(p.ds_numel * p.ds_tensor.element_size() for p in found)]
        for found in sharded
    ]
    with open(Path(str(trainer.args.output_dir)) / f"rank{trainer.args.process_index}.jsonl", "a") as file:
        file.write(json.dumps({"schedule": state, "weights": weights, "held": held}) + "\n")


DistillationTrainer.end_of_step = told
sys.exit(main())
