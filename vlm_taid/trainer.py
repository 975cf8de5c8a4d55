"""DistillationTrainer: transformers' Trainer with a teacher, paired streams, and one fused loss where the heads meet.

Legend: B rows, N answer tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .data.workers import deaf
from .errors import InputError
from .forward import PairedForward
from .lengths import LengthGrouped
from .objectives import FKL, MEMORY, LearnedTemperature, Objective, TAIDSchedule, diagnostic_names
from .pretrained import vision_towers
from .resumable import ResumableTrainer
from .rollout import Rollout
from .streamed_batches import StreamedBatches
from .streams import PairedBatch, PairedCollator
from .teachers import CachedTeacher, LiveTeacher, SeveralTeachers
from .trainable import without_adapters
from .training_log import RestWatch, Window, held_out_means, peak_memory, row_sums, schedule_values


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments, key for key, with the defaults of a distillation run."""

    output_dir: str = field(default="runs/distill", metadata={"help": "The run's folder: model, logs, checkpoints."})
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: go on from the newest whole checkpoint; never: remove them and start anew; or a folder."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are conversations: keep False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: str | list[str] | None = field(
        default="tensorboard", metadata={"help": "Live curves: tensorboard, trackio, wandb, several of them, or none."}
    )


class DistillationTrainer(ResumableTrainer):
    """Trains a student against a teacher, or on labels alone (objective ``sft``).

    The loss is the sum over the answer tokens of an optimizer step divided by their number over all micro-batches and
    ranks, so that accumulation, batch shape and ranks do not change it. TAID's t moves once an optimizer step, by the
    token mean of its signal, and is equal on all ranks.

    Args:
        model: the student, a transformers model.
        args: DistillationArguments.
        objective: what the student is held against.
        collator: makes PairedBatches.
        teacher: a LiveTeacher, SeveralTeachers or a CachedTeacher; None for ``sft``.
        schedule: TAID's schedule; None for other objectives.
        temperature: CTKD's learned temperature; None for other objectives.
        rollout: samples answers in place of the data's; None: the data's alone.
        tower_training: vision towers in train mode (dropout, BatchNorm statistics); else they stay in eval mode.
        memory: MiB for the logits that the fused loss holds at a time.
        diagnostics: log ``diagnostic_names`` too.
        lengths_R: tokens of the training rows, for batches of similar length; None: rows come as Trainer orders them.
        trainer_options: further arguments of Trainer (datasets, callbacks, processing_class, ...).
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    def __init__(
        self,
        model: Any,
        args: DistillationArguments,
        *,
        objective: Objective,
        collator: PairedCollator,
        teacher: LiveTeacher | SeveralTeachers | CachedTeacher | None = None,
        schedule: TAIDSchedule | None = None,
        temperature: LearnedTemperature | None = None,
        rollout: Rollout | None = None,
        tower_training: bool = False,
        memory: float = MEMORY,
        diagnostics: bool = False,
        lengths_R: Sequence[int] | None = None,
        **trainer_options: Any,
    ):
        super().__init__(model, args, data_collator=collator, **trainer_options)
        self.objective, self.teacher, self.schedule = objective, teacher, schedule
        self.temperature, self.collator, self.rollout = temperature, collator, rollout
        block = args.train_batch_size * args.world_size
        self.grouped = None if lengths_R is None else LengthGrouped(lengths_R, block, args.data_seed or args.seed)
        self.stream = self.train_dataset if isinstance(self.train_dataset, StreamedBatches) else None
        self.quiet_towers = [] if tower_training else vision_towers(without_adapters(model))
        self.card: Callable[[], str] | None = None  # makes the README.md of each saved model
        self.refused: Counter[str] = Counter()  # messages of this rank's refused rows
        self.refused_rows = self.seen_tokens = 0  # over all ranks
        self.steps_here = 0  # optimizer steps of this process; a resumed run has more
        self.diagnostics = diagnostic_names(teacher is not None) if diagnostics else ()
        self.paired_forward = PairedForward(
            self.accelerator, collator, teacher, temperature=temperature, memory=memory, diagnose=diagnostics
        )
        self.rest_watch = None if self.paired_forward.rest is None else RestWatch()
        self._step_sums = torch.zeros(5 + len(self.diagnostics), dtype=torch.float64, device=args.device)
        self._step_tokens = 0.0
        self._window = Window()

    # -- the loss ------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and its answer tokens over all ranks (at least 1)."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        for batch in batches:
            self.refused.update(batch["refused"])
            if self.stream is not None:
                self.stream.trained(batch)
        if self.rollout is not None:
            student = without_adapters(self.accelerator.unwrap_model(self.model_wrapped))
            at = {"step": self.state.global_step, "num_steps": self.state.max_steps}
            batches = [
                self.rollout.batch(batch, self.model_wrapped, student, micro_batch=number, **at)
                for number, batch in enumerate(batches)
            ]
        mine = [
            sum(len(batch["labels_N"]) for batch in batches),
            sum(len(batch["refused"]) for batch in batches),
            self.stop_requested,
            *((0, 0) if self.rollout is None else self.rollout.take_counts()),
            *(sum(values) for values in zip(*(batch["pairing"] for batch in batches), strict=True)),
        ]
        # one collective carries all counts, SIGTERM too
        counts = self.sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        tokens, refused, stop, sampled, fallbacks, *pairing = counts
        self.stopped = stop > 0
        self.refused_rows += int(refused)
        self.seen_tokens += int(tokens)
        self.steps_here += 1
        enough = min(100, 100 if self.stream else len(cast(Sized, self.train_dataset)))
        whole_run = self.steps_here == self.state.max_steps
        if self.seen_tokens == 0 and self.refused_rows and (whole_run or self.refused_rows >= enough):
            raise InputError(f"no row can be trained on; the first refused: {next(iter(self.refused), 'another rank')}")
        self._step_tokens = tokens
        self._window.add_pairing(pairing)
        self._window.sampled_rows += sampled
        self._window.sample_fallbacks += fallbacks
        return batches, max(tokens, 1.0)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this micro-batch and rank in the loss of the optimizer step."""
        for tower in self.quiet_towers:
            tower.eval()
        t, scale = self.schedule.t if self.schedule else None, self.accelerator.num_processes / num_items_in_batch
        output = self.paired_forward(model, inputs, self.objective, t, scale=float(scale))
        none_N = torch.zeros_like(output.kl_N)
        found = output.temperature_gradient_N, output.rest_N, output.agreement_N
        extra = [none_N if value_N is None else value_N for value_N in found]
        extra += [] if output.diagnostics_DN is None else output.diagnostics_DN
        self._step_sums += torch.stack([output.ce_N, output.kl_N, *extra]).double().sum(-1).detach()
        return output.loss_N.sum()

    def _prepare_inputs(self, inputs: PairedBatch) -> PairedBatch:
        return inputs.to(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        return deaf(super().get_train_dataloader() if self.stream is None else self.stream.loader(self.args))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.grouped is None else self.grouped

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return None if self.args.world_size > 1 else SequentialSampler(eval_dataset)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.grouped is not None:
            self.grouped.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs["student"])

    # -- the end of an optimizer step ----------------------------------------------------------------------------

    def end_of_step(self) -> None:
        """Moves t and counts, after the optimizer step of ``state.global_step - 1``."""
        self._window.tokens += self._step_tokens
        if self.stream is not None:  # Trainer counts from where it was resumed
            self.state.epoch = self.state.global_step / self.state.max_steps
        if self.teacher is None and not self.diagnostics:
            return
        ce, kl, slope, rest, agreed, *diagnostics = self.sum_over_ranks(self._step_sums).tolist()
        self._step_sums = torch.zeros_like(self._step_sums)
        self._window.kl += kl
        self._window.rest += rest
        self._window.agreed += agreed
        self._window.diagnostics.update(dict(zip(self.diagnostics, diagnostics, strict=True)))
        if self.rest_watch is not None and (warning := self.rest_watch.add(rest, self._step_tokens)):
            self.accelerator.print(warning)
        if self.schedule is not None:
            value = ce if self.schedule.signal == "ce" else kl
            mean = value / self._step_tokens if self._step_tokens else float("nan")
            self.schedule.update(mean, self.state.global_step - 1, self.state.max_steps)
        if self.temperature is not None and self._step_tokens:
            self.temperature.update(slope / self._step_tokens, self.state.global_step - 1, self.state.max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds t, KL, pairing, throughput and the largest rank's peak memory to the training logs."""
        if "loss" in logs:
            logs |= self._window.means(
                teacher=self.teacher is not None,
                paired=not self.collator.shared,
                rest=self.rest_watch is not None,
                rollout=self.rollout is not None,
            )
            peak = torch.tensor([peak_memory(self.args.device)], dtype=torch.float64, device=self.args.device)
            logs["peak_memory_gib"] = cast(torch.Tensor, self.accelerator.gather(peak)).max().item()
            self._window = Window()
            if self.schedule is not None:
                logs |= schedule_values(self.schedule, self.state.global_step - 1, self.state.max_steps)
            if self.temperature is not None:
                logs["temperature"] = self.temperature.value
            if self.rollout is not None and self.rollout.options.policy == "distillm":
                logs["rollout_threshold"] = self.rollout.threshold
            if self.refused_rows:
                logs["refused_rows"] = self.refused_rows
        super().log(logs, start_time)

    def not_training(self, seconds: float) -> None:
        """Leaves seconds out of the throughput, which is training's."""
        self._window.since += seconds

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Token means over the held-out rows, each row counted once, whatever the ranks and the batch size.

        An objective that interpolates or learns its temperature is evaluated as the forward KL to the teacher, so that
        values of different steps compare. Training's random state stays as it was.
        """
        model: Any = self.model_wrapped
        model.eval()
        objective = FKL() if self.schedule is not None or self.temperature is not None else self.objective
        sums_B4, refused, began = [], 0, time.perf_counter()
        # a DataLoader draws a seed when it starts: without the fork, evaluation would change training's dropout
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch in dataloader:
                for message in batch["refused"]:
                    self.refused[message] = max(self.refused[message], 1)
                refused += len(batch["refused"])
                batch = self._prepare_inputs(batch)
                output = self.paired_forward(model, batch, objective, None)
                rows_B4 = row_sums(output, batch["row_of_N"], batch["num_rows"])
                gathered: Any = self.accelerator.gather_for_metrics(rows_B4)
                sums_B4.append(gathered.cpu())
        metrics = held_out_means(torch.cat(sums_B4).sum(0), metric_key_prefix, teacher=objective.uses_teacher)
        counted = torch.tensor([float(refused)], dtype=torch.float64, device=self.args.device)
        if refused := self.sum_over_ranks(counted).item():
            metrics[f"{metric_key_prefix}_refused_rows"] = refused
        if self.rollout is not None and metric_key_prefix == "eval":
            self.rollout.validated(metrics["eval_loss"])
        self.not_training(time.perf_counter() - began)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(torch.cat(sums_B4)))  # pyright: ignore[reportArgumentType]

    # -- state ---------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        schedule = None if self.schedule is None else self.schedule.state_dict()
        temperature = None if self.temperature is None else self.temperature.state_dict()
        rollout = None if self.rollout is None else self.rollout.state_dict()
        refused, seen = dict(self.all_refused()), self.seen_tokens
        own = {"schedule": schedule, "temperature": temperature, "rollout": rollout}
        return own | {"refused": refused, "seen_tokens": seen}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.refused = Counter(state["refused"] if self.is_world_process_zero() else {})
        self.refused_rows = sum(state["refused"].values())
        self.seen_tokens = state.get("seen_tokens", 1)  # of an older checkpoint: rows were trained on before it
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.temperature is not None:
            self.temperature.load_state_dict(state["temperature"])
        if self.rollout is not None:
            self.rollout.load_state_dict(state["rollout"])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Each saved model has its card, those of checkpoints too."""
        super()._save(output_dir, state_dict)
        if self.card is not None and self.args.should_save:  # every rank comes here
            (Path(output_dir or str(self.args.output_dir)) / "README.md").write_text(self.card(), encoding="utf-8")

    def save_rank_state(self, checkpoint: Path) -> None:
        if self.rollout is not None:
            self.rollout.save_buffer(checkpoint)
        if self.stream is not None:
            self.stream.save(checkpoint)

    def load_rank_state(self, checkpoint: Path) -> None:
        if self.rollout is not None:
            self.rollout.load_buffer(checkpoint)
        if self.stream is not None:
            self.stream.load(checkpoint)

    def training_begins(self) -> None:
        self._window = Window()

    def all_refused(self) -> Counter[str]:
        """Messages of the refused rows of all ranks, with their counts; every rank must call."""
        return sum((Counter(dict(items)) for items in gather_object([list(self.refused.items())])), Counter())
