"""Recipe: everything that makes a run, typed; read from YAML and the command line by one parser."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import yaml
from jsonargparse import Namespace
from transformers.integrations.integration_utils import get_available_reporting_integrations

from .data import DataOptions
from .errors import InputError
from .evaluation_callback import EvaluationOptions
from .objectives import OBJECTIVES, LearnedTemperature, Objective, TAIDSchedule
from .parsing import Parser
from .rollout import RolloutOptions
from .students import StudentOptions
from .teachers import TeacherOptions, WeightedTeacherOptions
from .trainer import DistillationArguments

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


@dataclass
class ObjectiveOptions:
    """What the student is held against, and TAID's schedule."""

    name: Literal["taid", "fkl", "rkl", "js", "tvd", "sfkl", "srkl", "akl", "dkd", "ctkd", "sft"] = "taid"
    """taid, a baseline of the paper (fkl and rkl: the forward and reverse KL), or sft (labels alone, no teacher)."""
    ce_weight: float = 0.0
    """Share of the cross-entropy on the labels that is mixed in, 0 to 1."""
    temperature: float = 1.0
    """Divides both models' logits; the loss is multiplied by its square."""
    t_start: float = 0.4
    """taid: interpolation at the first step (paper: 0.4 for Phi-3, 0.2 for Llama-2 and StableLM teachers)."""
    t_end: float = 1.0
    """taid: interpolation at the last step."""
    alpha: float = 5e-4
    """taid: size of the adaptive step."""
    beta: float = 0.99
    """taid: momentum of the adaptive step."""
    adaptive: bool = True
    """taid: False moves t along the line alone."""
    signal: Literal["ce", "kl"] = "ce"
    """taid: what the adaptive step follows, the loss's cross-entropy form or its KL (ours)."""
    gain: float = 1.0
    """taid: factor on the signal's relative change (ours)."""
    interpolation: Literal["logits", "probabilities"] = "logits"
    """taid: what is interpolated, logits (paper) or probabilities (ours)."""
    divergence: Literal["kl", "rkl", "js"] = "kl"
    """taid: divergence to the interpolated target, kl (paper), or rkl or js (ours)."""
    weight: float = 0.1
    """js, sfkl, srkl, and taid with js: the weight w of the mixture."""
    mu: float = 0.5
    """akl: mass of the teacher's head."""
    target_weight: float = 1.0
    """dkd: weight of the target class's KL."""
    non_target_weight: float = 0.5
    """dkd: weight of the KL among the other tokens."""
    temperature_learning_rate: float = 0.05
    """ctkd: learning rate of its temperature (ours)."""
    mix: Literal["logits", "probabilities"] = "logits"
    """Several teachers: what of theirs is averaged by weight, logits or probabilities."""
    memory: float = 256.0
    """MiB for the logits of the answer tokens that are in memory at a time."""
    diagnostics: bool = False
    """Log entropies, KL to the teacher, and the student's mass in head and tail (the paper's table 3)."""

    def objective(self) -> Objective:
        """The objective, after a check that no option of another one is set."""
        if not self.memory > 0:
            raise InputError(f"objective.memory must be positive, not {self.memory}")
        known = {f.name for f in dataclasses.fields(OBJECTIVES[self.name]) if f.init}
        known |= {"name", "memory", "mix", "diagnostics"}
        if self.name == "taid":
            known |= {f.name for f in dataclasses.fields(TAIDSchedule)}
        if self.name == "ctkd":
            known |= {"temperature_learning_rate"}
        others = [f for f in dataclasses.fields(self) if f.name not in known and getattr(self, f.name) != f.default]
        if others:
            keys = ", ".join(f"objective.{field.name}" for field in others)
            raise InputError(f"objective.name is {self.name}, which has no option {keys}")
        if self.name == "taid" and self.divergence != "js" and self.weight != 0.1:
            raise InputError("objective.weight is read by taid only with objective.divergence: js")
        options = {f.name for f in dataclasses.fields(OBJECTIVES[self.name]) if f.init}
        try:
            return Objective.named(self.name, **{key: getattr(self, key) for key in options})
        except ValueError as error:
            raise InputError(f"objective: {error}") from error

    def schedule(self) -> TAIDSchedule | None:
        if self.name != "taid":
            return None
        try:
            return TAIDSchedule(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TAIDSchedule)})
        except ValueError as error:
            raise InputError(f"objective: {error}") from error

    def learned_temperature(self) -> LearnedTemperature | None:
        if self.name != "ctkd":
            return None
        try:
            return LearnedTemperature(self.temperature_learning_rate)
        except ValueError as error:
            raise InputError(f"objective: {error}") from error


@dataclass
class Recipe:
    """All that makes a run, checked.

    Args:
        student: the model that is trained.
        data: what it is trained on.
        objective: what it is held against.
        teacher: the model that is learned from; None with several teachers, or without any.
        training: the keys of DistillationArguments that differ from its defaults, and no others.
        rollout: answers that the student samples; None: the data's alone.
        teachers: several teachers, in place of one.
    """

    student: StudentOptions
    data: DataOptions
    objective: ObjectiveOptions
    teacher: TeacherOptions | None
    training: dict[str, Any]
    rollout: RolloutOptions | None = None
    evaluation: EvaluationOptions | None = None
    teachers: list[WeightedTeacherOptions] = dataclasses.field(default_factory=list)

    @property
    def all_teachers(self) -> list[TeacherOptions]:
        """The teacher, or the several."""
        return [*([] if self.teacher is None else [self.teacher]), *self.teachers]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a YAML recipe.

        Args:
            path: the file.
            overrides: as on the command line, ``["--training.max_steps", "100"]``.

        Raises:
            InputError: an unknown key (the nearest is named), a wrong type, or keys that do not go together.
        """
        return cls.parse(["--config", str(path), *overrides])

    @classmethod
    def parse(cls, arguments: Sequence[str], others: Sequence[str] = ()) -> Recipe:
        """Reads the command line's ``--config FILE --section.key VALUE ...``; ``others`` as in ``Parser.parse``.

        Raises:
            InputError: as ``load``.
        """
        arguments = ["--print_config=comments,skip_default" if a == "--print_config" else a for a in arguments]
        parsed, sections = recipe_parser().parse(arguments, others)
        recipe = cls(
            student=sections.student,
            data=sections.data,
            objective=sections.objective,
            teacher=sections.teacher,
            training=_changed(parsed.training),
            rollout=sections.rollout,
            evaluation=sections.evaluation,
            teachers=list(sections.teachers),
        )
        recipe.check()
        return recipe

    def check(self) -> None:
        """Refuses keys that do not go together.

        Raises:
            InputError: naming the keys.
        """
        objective = self.objective.objective()
        if objective.uses_teacher and not self.all_teachers:
            raise InputError(f"objective.name is {objective.name}, which needs teacher.path")
        if self.teacher is not None and self.teachers:
            raise InputError("teacher and teachers are both given: name one teacher by teacher, or several by teachers")
        if len(self.teachers) == 1:
            raise InputError("teachers has one entry: name one teacher by teacher")
        if any(one.cache is not None or one.weight <= 0.0 for one in self.teachers):
            raise InputError("teachers: each must be live (no cache) and have a positive weight")
        if self.objective.mix != "logits" and not self.teachers:
            raise InputError("objective.mix is read with several teachers alone")
        if any(one.zero_stage == 3 for one in self.all_teachers) and not self.training.get("deepspeed"):
            raise InputError("teacher.zero_stage is 3, which needs training.deepspeed and a launcher; 0 needs neither")
        for one in self.all_teachers:
            one.check()
        training = self.training
        if self.rollout is not None:
            self.rollout.check()
            if not objective.uses_teacher or objective.ce_weight > 0.0:
                raise InputError("rollout: sft and objective.ce_weight train on labels, and a sample is none")
            if self.teacher is not None and self.teacher.cache is not None:
                raise InputError("rollout needs a live teacher: teacher.cache holds the data's answers alone")
            if self.rollout.policy == "distillm" and training.get("eval_strategy", "no") == "no":
                raise InputError("rollout.policy: distillm follows the validation loss: set training.eval_strategy")
        if self.evaluation is not None:
            self.evaluation.tasks()
            if training.get("fsdp"):
                raise InputError(
                    "evaluation: under FSDP all ranks would have to write equally long answers: use DeepSpeed or DDP, "
                    "or leave evaluation out and run vlm-taid eval run on a checkpoint"
                )
        if training.get("eval_strategy", "no") != "no" and not self.data.validation:
            raise InputError("training.eval_strategy is set and data.validation is empty: give at least one source")
        self._check_order()
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if training.get(key, 1) < 1:
                raise InputError(f"training.{key} is {training[key]}: at least 1 is needed")
        if training.get("label_smoothing_factor"):
            raise InputError("training.label_smoothing_factor has no meaning here: the objective makes the targets")
        if training.get("resume_from_checkpoint"):
            raise InputError("training.resume_from_checkpoint is called training.resume here")
        if not self.data.train:
            raise InputError("data.train is empty: give at least one source")
        self.objective.schedule()
        self.objective.learned_temperature()

    def _check_order(self) -> None:
        strategy = self.training.get("train_sampling_strategy")
        if strategy == "batch_rebalance":
            raise InputError(
                "training.train_sampling_strategy: batch_rebalance is not supported: group_by_length gives all ranks "
                "rows of similar length, and data.packing equally many tokens"
            )
        if self.data.streaming:
            if self.training.get("max_steps", -1) < 1:
                raise InputError("data.streaming has no end: set training.max_steps")
            if strategy == "group_by_length":
                raise InputError(
                    "data.streaming reads rows as they come: data.packing saves padding, not group_by_length"
                )
            if self.rollout is not None or any(one.cache is not None for one in self.all_teachers):
                raise InputError("rollout and teacher.cache look rows up by their places: set data.streaming: false")
        if not self.data.packing:
            return
        if self.data.max_length is None:
            raise InputError("data.packing needs data.max_length: the tokens of a sequence")
        if strategy == "group_by_length":
            raise InputError("data.packing leaves no padding for training.train_sampling_strategy: group_by_length")
        if self.rollout is not None:
            raise InputError("rollout samples answers row by row: set data.packing: false")

    def arguments(self) -> DistillationArguments:
        """The training section as DistillationArguments; under a launcher this starts the process group.

        Raises:
            InputError: transformers refuses a value, or a DeepSpeed run has no launcher.
        """
        wants_deepspeed = bool(self.training.get("deepspeed"))
        if wants_deepspeed and "LOCAL_RANK" not in os.environ:
            raise InputError(
                "training.deepspeed is set and there is no launcher: run deepspeed --num_gpus N --module vlm_taid "
                "distill --config ..., or set --training.deepspeed null for one process without DeepSpeed"
            )
        on_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}  # else accelerate finds no back end
        if on_cpu and wants_deepspeed:
            # its shared-memory extension needs a C++ compiler and over half a minute; gloo does the same work
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            arguments = DistillationArguments(**{**self.training, **on_cpu})
        except (ValueError, ImportError) as error:
            raise InputError(f"training: {error}") from error
        for name in arguments.report_to or []:
            if name not in get_available_reporting_integrations():
                raise InputError(f"training.report_to: {name} is not installed (pip install {name}), or is unknown")
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one GPU: more come by a launcher
        config = arguments.hf_deepspeed_config if wants_deepspeed else None
        if config is not None and config.is_zero3() and not config.get_value(GATHER):
            raise InputError(f"training.deepspeed: ZeRO-3 needs {GATHER}: true, or no model would be saved at the end")
        if "SHARDED" in str((arguments.fsdp_plugin_args or {}).get("state_dict_type")).upper():
            raise InputError(
                "training.fsdp_config: state_dict_type must be FULL_STATE_DICT (the default), or no model would be "
                "saved at the end"
            )
        if wants_deepspeed and not deepspeed.comm.is_initialized():  # from_pretrained shards under ZeRO-3
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a recipe file; an ``sft`` run needs no teacher section."""
        sections = {"student": self.student, "teacher": self.teacher, "data": self.data, "objective": self.objective}
        sections |= {"rollout": self.rollout, "evaluation": self.evaluation}
        plain: dict[str, Any] = {key: dataclasses.asdict(value) for key, value in sections.items() if value is not None}
        if self.teachers:
            plain["teachers"] = [dataclasses.asdict(one) for one in self.teachers]
        return {**plain, "training": self.training}

    def save(self, path: Path) -> None:
        """Writes the resolved recipe as YAML, readable by ``--config``."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def recipe_parser() -> Parser:
    """The parser of a recipe: every key with its sentence, unknown keys and wrong types refused."""
    parser = Parser(prog="vlm-taid distill", description="Distil a student.")
    parser.add_argument("--config", action="config", help="YAML recipe; may be given several times.")
    parser.add_class_arguments(StudentOptions, "student", help="the model that is trained")
    parser.add_argument("--teacher", type=TeacherOptions | None, default=None, help="the model that is learned from")
    parser.add_argument("--teachers", type=list[WeightedTeacherOptions], default=[], help="several teachers")
    parser.add_class_arguments(DataOptions, "data", help="what is trained on")
    parser.add_class_arguments(ObjectiveOptions, "objective", help="what the student is held against")
    parser.add_argument("--rollout", type=RolloutOptions | None, default=None, help="answers that the student samples")
    parser.add_argument("--evaluation", type=EvaluationOptions | None, default=None, help="scores during training")
    parser.add_class_arguments(
        DistillationArguments,
        "training",
        instantiate=False,
        skip={"local_rank"},
        help="transformers' TrainingArguments",
    )
    sentences = {field.name: field.metadata.get("help") for field in dataclasses.fields(DistillationArguments)}
    for action in parser._actions:
        name = action.dest.removeprefix("training.")
        if action.dest.startswith("training.") and sentences.get(name):
            action.help = str(sentences[name]).replace("%", "%%")
    return parser


def _changed(training: Namespace) -> dict[str, Any]:
    """The training keys whose values are not the defaults."""
    defaults = {}
    for field in dataclasses.fields(DistillationArguments):
        factory = field.default_factory
        defaults[field.name] = field.default if factory is dataclasses.MISSING else factory()
    given = {key: _plain(value) for key, value in vars(training).items()}
    return {key: value for key, value in given.items() if value != _plain(defaults.get(key, dataclasses.MISSING))}


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)  # enums by their names
