"""The command, with every rank writing after each optimizer step what it holds: t, momentum, a sum over its weights."""

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
    with open(Path(str(trainer.args.output_dir)) / f"rank{trainer.args.process_index}.jsonl", "a") as file:
        file.write(json.dumps({"schedule": state, "weights": weights}) + "\n")


DistillationTrainer.end_of_step = told
sys.exit(main())
