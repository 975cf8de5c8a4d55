"""plan: will a recipe fit, and how long does a step take, before anything is downloaded but a config.

The models' footprints are measured on fake tensors; the rest is arithmetic over ranks and stages.

Legend of names: bytes are per rank unless said otherwise; a row has ``length`` tokens, image tokens included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .footprint import Footprint, Pictures, footprint
from .objectives.linear import MEMORY
from .recipe import Recipe
from .teachers import EIGHTS, FOURS, K, bytes_a_token

GB = 1e9
BUCKETS = 2 * 5e8  # elements of DeepSpeed's default reduce and gather buckets, in the weights' type
LIVE = 1e9  # elements of a ZeRO-3 model that DeepSpeed keeps gathered, by default
STORED_BYTES = bytes_a_token(2**17, K, EIGHTS, FOURS)  # of a stored teacher's answer token, of a large vocabulary


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    gpus: int
    """GPUs in all, over all nodes."""
    gpu_memory: float = 80.0
    """GB of one GPU."""
    reserve: float = 4.0
    """GB of one GPU that are left to the driver, the allocator's gaps and the kernels' work space."""
    gpu_tflops: float = 989.0
    """Peak of one GPU in TFLOP/s at the training precision; 989 is an H100's dense bf16."""
    utilisation: float = 0.4
    """The share of that peak which a run reaches."""
    bandwidth: float = 50.0
    """GB/s into one GPU from the others; 50 is a 400 Gbit/s network card for each GPU."""


@dataclass(frozen=True)
class Memory:
    """One rank's bytes."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    teacher: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Setting:
    """How the student's training state is spread."""

    stage: int
    offload: bool
    checkpointing: bool
    rows: int
    deepspeed: bool = True
    bf16: bool = True


def memory(student: Footprint, teacher: float, setting: Setting, ranks: int, answer_share: float = 1.0) -> Memory:
    """One rank's bytes at the fullest moment of a step.

    Args:
        student: its footprint at the row's length, measured in the dtype that it is trained in.
        teacher: bytes of the teacher on this rank.
        setting: stage, offload, checkpointing, rows of a micro-batch.
        ranks: GPUs.
        answer_share: supervised tokens of a row, as a share.
    """
    P, trained, stage = student.parameters, student.trained, setting.stage
    half = setting.deepspeed and setting.bf16
    weights = (2.0 if half else 4.0) * (P / ranks + min(LIVE, P) if stage == 3 else P)
    gradients = (2.0 if half else 4.0) * trained / (ranks if stage >= 2 else 1)
    optimizer = (12.0 if half else 8.0) * trained / (ranks if stage >= 1 else 1) * (0 if setting.offload else 1)
    activations = setting.rows * student.activations[setting.checkpointing]
    N = setting.rows * student.length * answer_share
    logits = min(MEMORY * 2**20, 4 * 4 * N * student.head_rows)
    hidden = 2 * 4 * N * student.width
    head = 4.0 * student.head_rows * student.width * student.trained_head
    buckets = min(BUCKETS, 2.0 * trained) * (2 if half else 4) if setting.deepspeed and ranks > 1 else 0.0
    if not setting.deepspeed and not setting.checkpointing:  # the activations are gone when the gradients are whole
        gradients, activations = (gradients, 0.0) if gradients > activations else (0.0, activations)
    return Memory(weights, gradients, optimizer, buckets, teacher, activations, logits + hidden + head)


def largest_rows(student: Footprint, teacher: float, setting: Setting, machine: Machine, answer_share: float) -> int:
    """The most rows of a micro-batch that fit, as a power of two; 0: not even one."""
    rows, limit = 0, (machine.gpu_memory - machine.reserve) * GB
    for exponent in range(9):
        tried = Setting(setting.stage, setting.offload, setting.checkpointing, 2**exponent)
        if memory(student, teacher, tried, machine.gpus, answer_share).total > limit:
            break
        rows = 2**exponent
    return rows


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    student: float
    teacher: float
    student_gather: float
    teacher_gather: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.student_gather + self.teacher_gather


def step_time(
    student: Footprint, teacher: Footprint | None, setting: Setting, machine: Machine, accumulation: int,
    teacher_stage: int, answer_share: float = 1.0,
) -> StepTime:  # fmt: skip
    """Operations over the utilised peak, and what is gathered over the bandwidth, one after the other.

    The student's forward counts three times (backward is twice a forward), four times with gradient checkpointing.
    ZeRO-3 gathers a model's weights in each forward and each backward, and reduces the gradients once.
    """
    speed = machine.gpu_tflops * 1e12 * machine.utilisation
    rows = setting.rows * accumulation
    others = (machine.gpus - 1) / machine.gpus

    def heads(model: Footprint) -> float:
        return 2.0 * model.length * answer_share * model.head_rows * model.width

    times = 4 if setting.checkpointing else 3
    seen = times if student.trained_tower else 1
    student_seconds = rows * (times * student.flops + seen * student.picture_flops + 3 * heads(student)) / speed
    passes = (2 + setting.checkpointing + 1) * accumulation if setting.stage == 3 else 2
    student_gather = passes * 2.0 * student.parameters * others / (machine.bandwidth * GB)
    if teacher is None:
        return StepTime(student_seconds, 0.0, student_gather, 0.0)
    teacher_gather = gathered_bytes(teacher, machine.gpus) * accumulation / (machine.bandwidth * GB)
    return StepTime(
        student_seconds, rows * (teacher.flops + teacher.picture_flops + heads(teacher)) / speed, student_gather,
        teacher_gather if teacher_stage == 3 else 0.0,
    )  # fmt: skip


def gathered_bytes(teacher: Footprint, gpus: int) -> float:
    """What each rank receives of a ZeRO-3 teacher in bf16 for one micro-batch."""
    return 2.0 * teacher.parameters * (gpus - 1) / gpus


def plan(
    recipe: Recipe, machine: Machine, length: int = 2048, answer_share: float = 1.0, pictures: Pictures | None = None
) -> str:
    """The plan of a recipe, as text.

    Args:
        recipe: of which the models' configs, the stages, the batch and the accumulation count.
        machine: the GPUs.
        length: tokens of a row, image tokens included.
        answer_share: supervised tokens of a row, as a share.
        pictures: a row's; None: the vision towers' activations and operations are not counted.

    Raises:
        InputError: a config cannot be read, or there are several teachers.
    """
    training = recipe.training
    if machine.gpus < 1:
        raise InputError(f"--gpus is {machine.gpus}: at least 1 is needed")
    if recipe.teachers:
        raise InputError(
            "plan counts one teacher: give teacher in the place of teachers, with their parameters together"
        )
    student = footprint(recipe.student, length, torch.bfloat16, pictures=pictures)
    live = recipe.teacher is not None and recipe.teacher.cache is None
    teacher = None
    if live and recipe.teacher is not None:
        teacher = footprint(recipe.teacher, length, torch.bfloat16, trained=False, pictures=pictures)
    stage_of_teacher = recipe.teacher.zero_stage if recipe.teacher else 0
    kept = {0: 0.0, 3: 0.0}
    if teacher is not None:
        P = teacher.parameters
        kept = {0: 2.0 * P, 3: 2.0 * (P / machine.gpus + min(LIVE, P))}
    rows, accumulation = training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)
    stage, offload = _stage(training.get("deepspeed"))
    own = Setting(stage, offload, bool(training.get("gradient_checkpointing")), rows)
    limit = machine.gpu_memory - machine.reserve

    lines = [
        f"{machine.gpus} GPUs of {machine.gpu_memory:g} GB, {machine.reserve:g} GB in reserve; rows of {length} tokens",
        f"student  {_about(student)}",
        f"teacher  {_about(teacher)}" if teacher else "teacher  none in memory (labels alone, or stored)",
        "",
        f"this recipe: student ZeRO-{stage}{', optimizer on the host' if offload else ''}, teacher "
        f"ZeRO-{stage_of_teacher}, {rows} rows x {accumulation} micro-batches on each GPU",
    ]
    need = memory(student, kept[stage_of_teacher], own, machine.gpus, answer_share)
    lines += [f"  {name:<12}{value / GB:8.1f} GB" for name, value in vars(need).items()]
    lines += [
        f"  {'together':<12}{need.total / GB:8.1f} GB of {limit:g}: "
        f"{'fits' if need.total <= limit * GB else 'DOES NOT FIT'}"
    ]
    lines += ["", "most rows of a micro-batch (0: none fits), without and with gradient checkpointing:"]
    teachers = [(0, "teacher whole"), (3, "teacher sharded")] if teacher else [(0, "no teacher in memory")]
    teachers += [(-1, "teacher stored")] if teacher else []
    lines += [f"  {'student':<24}" + "".join(f"{name:>22}" for _, name in teachers)]
    for number in (0, 1, 2, 3):
        for host in (False, True) if number else (False,):
            cells = []
            for key, _ in teachers:
                most = [
                    largest_rows(student, kept.get(key, 0.0), Setting(number, host, deep, 1), machine, answer_share)
                    for deep in (False, True)
                ]
                cells.append(f"{most[0]:>18} / {most[1]}"[-22:].rjust(22))
            lines += [f"  {'ZeRO-' + str(number) + (', optimizer on host' if host else ''):<24}" + "".join(cells)]

    time = step_time(student, teacher, own, machine, accumulation, stage_of_teacher, answer_share)
    lines += [
        "",
        f"a step, at {machine.utilisation:.0%} of {machine.gpu_tflops:g} TFLOP/s and {machine.bandwidth:g} GB/s, "
        "nothing overlapped:",
    ]
    lines += [f"  {name.replace('_', ' '):<16}{value:8.2f} s" for name, value in vars(time).items()]
    lines += [f"  {'together':<16}{time.total:8.2f} s"]
    if teacher is not None:
        gathered = gathered_bytes(teacher, machine.gpus)
        lines += [
            "",
            f"a sharded teacher is gathered anew in each micro-batch: {gathered / GB:.0f} GB into every GPU, "
            f"{gathered / GB / machine.bandwidth:.1f} s at {machine.bandwidth:g} GB/s",
        ]
        stored = time.student + time.student_gather
        per_step = rows * accumulation * machine.gpus * length * answer_share * STORED_BYTES / GB
        lines += [
            f"a stored teacher: {stored:.2f} s a step, {per_step:.3f} GB of disk for each step's rows "
            f"({STORED_BYTES:g} bytes an answer token)"
        ]
        fits = kept[stage_of_teacher] < limit * GB
        better = "better" if not fits or time.total > 1.5 * stored else "of little use"
        lines += [
            f"  it is {better} here{'' if fits else ' (the teacher does not fit)'}; making it costs the teacher's part "
            "once for every row, so it pays from the second pass over the rows, or the second run, on"
        ]
    return "\n".join(lines)


def _about(model: Footprint) -> str:
    vision = f", {model.vision / GB:.2f} of them in the vision part" if model.vision else ""
    trained = f", {model.trained / GB:.3f} of them trained" if model.trained < model.parameters else ""
    plain, checkpointed = (f"{value / GB:.2f} GB" for value in model.activations)
    kept = f"; its activations {plain}, with gradient checkpointing {checkpointed}" if any(model.activations) else ""
    pictures = f" and {model.picture_flops / 1e12:.2f} for its pictures" if model.picture_flops else ""
    tower = "; pictures are not counted: give --pictures" if model.vision and not pictures else ""
    return (
        f"{model.parameters / GB:.2f} billion parameters{vision}{trained}, {2 * model.parameters / GB:.1f} GB in bf16; "
        f"a row takes {model.flops / 1e12:.2f} TFLOP forward{pictures}{kept}{tower}"
    )


def _stage(deepspeed: Any) -> tuple[int, bool]:
    """ZeRO stage and optimizer offload of ``training.deepspeed``."""
    if not deepspeed:
        return 0, False
    import json

    config = deepspeed
    if isinstance(deepspeed, str):
        try:
            with open(deepspeed) as file:
                config = json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"training.deepspeed: {deepspeed} cannot be read: {error}") from error
    zero = config.get("zero_optimization", {})
    return int(zero.get("stage", 0)), zero.get("offload_optimizer", {}).get("device", "none") != "none"
