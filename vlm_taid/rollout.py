"""On-policy distillation: answers that the student samples take the place of the data's.

``gkd`` (arXiv 2306.13649) samples for a fixed share of the micro-batches. ``distillm`` (arXiv 2402.03898, algorithm 1)
samples more often when the validation loss rises, and takes ever more of the samples from a replay buffer.
"""

from __future__ import annotations

import copy
import json
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from .data import Conversation, Part, Turn
from .errors import InputError
from .streams import PairedBatch, PairedCollator, StreamEncoder, encode_prompts


@dataclass
class RolloutOptions:
    """Training on answers that the student samples itself."""

    policy: Literal["gkd", "distillm"] = "gkd"
    """gkd: for a fixed share of the micro-batches; distillm: as often as a threshold says, with a replay buffer."""
    probability: float = 0.5
    """gkd: share of the micro-batches whose last answers the student samples."""
    threshold: float = 0.0
    """distillm: share of the micro-batches with sampled answers at the start."""
    threshold_step: float = 0.1
    """distillm: what a rise of the validation loss adds to the threshold, which ends at 1."""
    buffer_rows: int = 1000
    """distillm: samples that a rank keeps, the newest."""
    max_new_tokens: int = 256
    """Tokens of a sample at most."""
    temperature: float = 1.0
    """Of the sampling; 0: the likeliest token each time."""

    def check(self) -> None:
        """Raises:
        InputError: a number out of its range.
        """
        for name in ("probability", "threshold", "threshold_step"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"rollout.{name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("buffer_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"rollout.{name} is {getattr(self, name)}, expected at least 1")
        if self.temperature < 0.0:
            raise InputError(f"rollout.temperature is {self.temperature}, expected 0 or more")


class Rollout:
    """Decides where a micro-batch's answers come from, samples them, and keeps the replay buffer.

    Decisions and random numbers are a function of the seed, the optimizer step and the micro-batch: all ranks decide
    alike without a word, training's own random state is left alone, and a resumed run decides as the first one did.

    Args:
        options: RolloutOptions.
        dataset: indexed by ``Conversation.index``.
        collator: pairs the sampled answers as it does the data's.
        seed: of decisions and samples.
        rank: this process's, so that ranks sample different answers.

    Attributes:
        sampled_rows, fallbacks: rows of this rank that the student was to answer since ``take_counts``, and those of
            them that kept the data's answer because the sample was empty or could not be encoded.
    """

    def __init__(self, options: RolloutOptions, dataset: Any, collator: PairedCollator, *, seed: int, rank: int = 0):
        self.options, self.dataset, self.seed, self.rank = options, dataset, seed, rank
        self.collator = copy.copy(collator)
        self.collator.options = replace(collator.options, on_bad_row="skip")  # a bad sample is no bad row
        self.threshold = options.threshold
        self.validation_loss: float | None = None
        self.asked = 0  # rows that a rank asked for so far: how full the buffer could be, the same on all ranks
        self.buffer: deque[tuple[int, str]] = deque(maxlen=options.buffer_rows)
        self.sampled_rows = self.fallbacks = 0

    def source(self, step: int, num_steps: int, micro_batch: int) -> Literal["data", "student", "buffer"]:
        """Where the answers of a micro-batch come from.

        Args:
            step: optimizer steps done, from 0.
            num_steps: of the whole run.
            micro_batch: its number in the optimizer step, from 0.
        """
        drawn = random.Random(f"source {self.seed} {step} {micro_batch}").random()
        if self.options.policy == "gkd":
            return "student" if drawn < self.options.probability else "data"
        fresh = self.threshold * (1.0 - step / num_steps)  # the paper's replay ratio grows along a line
        if drawn < fresh or (drawn < self.threshold and self.asked < self.options.buffer_rows):
            return "student"
        return "buffer" if drawn < self.threshold else "data"

    def batch(
        self, batch: PairedBatch, model: Any, student: Any, *, step: int, num_steps: int, micro_batch: int
    ) -> PairedBatch:
        """The micro-batch as it is to be trained on; every rank must call.

        Args:
            batch: the data's.
            model: the student in its wrapper (DDP, DeepSpeed engine, ...).
            student: the student itself.
        """
        source = self.source(step, num_steps, micro_batch)
        if source == "data":
            return batch
        draws = f"{self.seed} {step} {micro_batch} {self.rank}"
        rows = [_until_last_answer(self.dataset[index]) for index in batch["rows"]]
        if source == "student":
            answers = self._sample(rows, model, student, random.Random(f"sample {draws}").getrandbits(63))
            self.asked += batch["num_rows"]
        else:
            some = random.Random(f"replay {draws}").sample(list(self.buffer), min(len(rows), len(self.buffer)))
            if not some:
                self.sampled_rows, self.fallbacks = self.sampled_rows + len(rows), self.fallbacks + len(rows)
                return batch
            rows, answers = [_until_last_answer(self.dataset[index]) for index, _ in some], [text for _, text in some]
        own = [None if text is None else _answered(row, text) for row, text in zip(rows, answers, strict=True)]
        made = self.collator([mine or row for mine, row in zip(own, rows, strict=True)])
        fits = set(made["row_of_N"].tolist())
        if len(fits) < len(rows):
            own = [mine if place in fits else None for place, mine in enumerate(own)]
            made = self.collator([mine or row for mine, row in zip(own, rows, strict=True)])
        if source == "student" and self.options.policy == "distillm":
            for row, text, mine in zip(rows, answers, own, strict=True):
                if row.index is not None and text is not None and mine is not None:
                    self.buffer.append((row.index, text))
        self.sampled_rows += len(rows)
        self.fallbacks += own.count(None)
        made["refused"] = batch["refused"]
        return made

    def take_counts(self) -> tuple[int, int]:
        """``sampled_rows`` and ``fallbacks``, which begin at 0 again."""
        counts = self.sampled_rows, self.fallbacks
        self.sampled_rows = self.fallbacks = 0
        return counts

    def validated(self, loss: float) -> None:
        """Raises the threshold where the validation loss has risen; the loss is the same on every rank."""
        if self.validation_loss is not None and loss > self.validation_loss:
            self.threshold = min(1.0, self.threshold + self.options.threshold_step)
        self.validation_loss = loss

    def _sample(self, rows: list[Conversation], model: Any, student: Any, seed: int) -> list[str | None]:
        """The student's answers; None where there is no prompt, or the sample is no text that could be an answer."""
        encoder = self.collator.student
        asked = [row for row in rows if len(row.turns) > 1]
        prompts = list(asked)
        if not asked or (encoder.takes_images and not any(row.images for row in asked)):
            prompts.append(encoder.filler)  # every rank must enter the same modules
        device = next(student.parameters()).device
        inputs = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in encode_prompts(encoder, prompts).items()
        }
        ends = encoder.stop_ids
        sampling = {"do_sample": True, "temperature": self.options.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=encoder.tokenizer.pad_token_id,
            num_beams=1,
            use_cache=True,
            **(sampling if self.options.temperature > 0.0 else {"do_sample": False}),
        )
        modes = [(module, module.training) for module in student.modules()]
        devices = [device] if device.type == "cuda" else []
        with generating(model) as synced, torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            student.eval()
            ids_BT = student.generate(**inputs, generation_config=settings, synced_gpus=synced)
        for module, training in modes:
            module.training = training
        new_BT = ids_BT[:, inputs["input_ids"].shape[1] :].tolist()
        texts = iter([_text(ids, ends, encoder) for ids in new_BT])
        return [next(texts) if len(row.turns) > 1 else None for row in rows]

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks, in plain numbers."""
        return {"threshold": self.threshold, "validation_loss": self.validation_loss, "asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.validation_loss, self.asked = (
            state[key] for key in ("threshold", "validation_loss", "asked")
        )

    def save_buffer(self, checkpoint: Path) -> None:
        """Writes this rank's replay buffer."""
        self._file(checkpoint).write_text(json.dumps(list(self.buffer)))

    def load_buffer(self, checkpoint: Path) -> None:
        """Reads it; a rank that was not there begins with an empty one."""
        file = self._file(checkpoint)
        self.buffer.clear()
        if file.is_file():
            self.buffer += [(index, text) for index, text in json.loads(file.read_text())]

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"replay_buffer_{self.rank}.json"


@contextmanager
def generating(model: Any) -> Iterator[bool]:
    """Makes a wrapped model's student able to generate; every rank must enter. Gives ``generate``'s ``synced_gpus``.

    Under ZeRO-3 the parameters are gathered once, for a student fits where it is trained; FSDP gathers them layer by
    layer at each token, so there all ranks must take equally many.
    """
    stage = getattr(model, "zero_optimization_stage", None)
    if stage is not None and stage() == 3:
        import deepspeed

        with deepspeed.zero.unwrap_model_for_generation(model):
            yield False
    else:
        yield isinstance(model, FSDPModule)


def _until_last_answer(row: Conversation) -> Conversation:
    last = max(place for place, turn in enumerate(row.turns) if turn.role == "assistant")
    return replace(row, turns=row.turns[: last + 1])


def _answered(row: Conversation, text: str) -> Conversation:
    return replace(row, turns=(*row.turns[:-1], Turn("assistant", (Part(text),))))


def _text(ids: list[int], ends: set[int], encoder: StreamEncoder) -> str | None:
    """A sample's text up to its end; a sample that reached no end is an answer's beginning, which teaches as well."""
    stop = next((place for place, i in enumerate(ids) if i in ends), len(ids))
    if encoder.token_bytes.special & set(ids[:stop]):
        return None
    text = encoder.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
    return None if not text.strip() or "\ufffd" in text else text
