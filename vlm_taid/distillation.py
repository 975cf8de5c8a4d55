"""distill: from a recipe to a trained student in its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from .caching import belongs
from .checkpoints import MANIFEST, alone_in, broken, full_disk_named, newest_whole
from .data import ConversationDataset, StreamedRows
from .errors import InputError
from .evaluation_callback import EvaluationCallback
from .lengths import PackedRows, row_lengths
from .model_card import model_card
from .pairing import paired_collator
from .recipe import Recipe
from .rollout import Rollout
from .streamed_batches import StreamedBatches
from .streams import PairedCollator
from .students import load_student
from .teachers import CachedTeacher, LiveTeacher, SeveralTeachers, head_rows
from .trainable import check_trainable, freeze, save_merged, with_adapters
from .trainer import DistillationArguments, DistillationTrainer

DONE = "complete.json"


def distill(recipe: Recipe) -> Path:
    """Trains the recipe's student; on every rank of a launcher, or in one process.

    Args:
        recipe: what to do. With ``training.resume: auto`` the newest whole checkpoint of the output folder is gone
            on from, bit for bit.

    Returns:
        The run's folder: the student and its processor in transformers' format, ``recipe.yaml``, ``metrics.jsonl``,
        ``README.md``, ``complete.json`` (written last) and the checkpoints.

    Raises:
        InputError: something in the recipe, the models or the data cannot be used.
    """
    arguments = recipe.arguments()
    output = Path(arguments.output_dir)
    with full_disk_named(output), ExitStack() as held:

        def decided() -> tuple[bool, Path | None]:
            if arguments.resume == "auto" and (output / DONE).is_file() and not _changed(recipe, output):
                return True, None
            held.enter_context(alone_in(output))
            return False, _checkpoint(arguments, recipe, output)

        complete, checkpoint = _decided_by_rank_zero(decided)
        if not complete:
            return _trained(recipe, arguments, output, checkpoint)
        if arguments.process_index == 0:
            print(f"{output} is complete; --training.resume never trains it anew")
        return output


def _trained(recipe: Recipe, arguments: DistillationArguments, output: Path, checkpoint: Path | None) -> Path:
    set_seed(arguments.seed)
    trainer = build_trainer(recipe, arguments)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if arguments.resume == "never":  # else a later resume would take the old run's last checkpoint
            for old in output.glob("checkpoint-*"):
                shutil.rmtree(old)
        (output / DONE).unlink(missing_ok=True)
        recipe.save(output / "recipe.yaml")
    trainer.stop_on_sigterm()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ValueError as error:
        if "DeepSpeed config values" in str(error):  # batch sizes, learning rate: transformers lists those that differ
            raise InputError(f"training.deepspeed: {error}") from error
        raise
    _report_refused(trainer, output)
    if trainer.stopped and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.print(
            f"stopped by SIGTERM after step {trainer.state.global_step}: run the same command to go on"
        )
        return output
    if recipe.student.lora is None:
        trainer.save_model(str(output))
    else:
        trainer.save_model(str(output / "adapter"))
        if trainer.is_world_process_zero():
            save_merged(lambda: _student(recipe, trainer.collator), output / "adapter", output)
            cast(Any, trainer.processing_class).save_pretrained(output)
    trainer.store_state()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        (output / "README.md").write_text(model_card(recipe, trainer.state, trainer.model), encoding="utf-8")
        (output / DONE).write_text(json.dumps({"global_step": trainer.state.global_step}))
    trainer.accelerator.wait_for_everyone()
    return output


def _decided_by_rank_zero(decide: Callable[[], Any]) -> Any:
    """One decision for all ranks: they may see other files, or the same ones at another time."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = decide()
        except InputError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]


def build_trainer(recipe: Recipe, arguments: DistillationArguments) -> DistillationTrainer:
    """The trainer with all its parts: models, encoders, data.

    Raises:
        InputError: something in the recipe, the models or the data cannot be used.
    """
    objective, schedule = recipe.objective.objective(), recipe.objective.schedule()
    collator = paired_collator(recipe)
    student = _student(recipe, collator)
    freeze(student, recipe.student.freeze)
    check_trainable(student)
    if recipe.student.lora is not None:
        student = with_adapters(student, recipe.student.lora, recipe.student.freeze, arguments.seed)
    teacher, vocabulary = None, collator.vocabulary
    if recipe.all_teachers and collator.teacher is not None and vocabulary is not None:
        if recipe.teacher is None:
            teacher = SeveralTeachers(recipe.teachers, arguments.device, recipe.objective.mix)
        elif recipe.teacher.cache is None:
            teacher = LiveTeacher(recipe.teacher, arguments.device)
        else:
            expected = belongs(recipe, collator.teacher, vocabulary)
            teacher = CachedTeacher(recipe.teacher.cache, expected, arguments.device)
            collator.stored = teacher.stored
        vocabulary.check_fits(head_rows(student), teacher.head_rows)

    def rows(sources: Any) -> ConversationDataset:
        return ConversationDataset(
            sources, on_bad_row=recipe.data.on_bad_row, allow_urls=recipe.data.allow_urls, seed=arguments.seed
        )

    strategy, lengths_R = arguments.train_sampling_strategy, None
    train_dataset: Any = _stream(recipe, collator, arguments) if recipe.data.streaming else rows(recipe.data.train)
    eval_dataset = rows(recipe.data.validation) if recipe.data.validation else None
    if isinstance(teacher, CachedTeacher):
        for dataset in (train_dataset, eval_dataset):
            teacher.check_rows(dataset.row_names() if dataset else [])
    rollout = None
    if recipe.rollout is not None:
        rank = arguments.process_index
        rollout = Rollout(recipe.rollout, train_dataset, collator, seed=arguments.seed, rank=rank)
    if strategy == "group_by_length":
        lengths_R = row_lengths(train_dataset, collator, arguments)
    elif recipe.data.packing and not recipe.data.streaming:
        tokens_R = row_lengths(train_dataset, collator, arguments)
        seed = None if strategy == "sequential" else arguments.seed
        train_dataset = PackedRows(train_dataset, tokens_R, cast(int, recipe.data.max_length), seed)
    trainer = DistillationTrainer(
        student,
        arguments,
        objective=objective,
        collator=collator,
        teacher=teacher,
        schedule=schedule,
        temperature=recipe.objective.learned_temperature(),
        rollout=rollout,
        tower_training=recipe.student.tower_mode == "train",
        memory=recipe.objective.memory,
        diagnostics=recipe.objective.diagnostics,
        lengths_R=lengths_R,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=collator.student.processor,
    )
    trainer.card = lambda: model_card(recipe, trainer.state, trainer.model)
    if recipe.evaluation is not None:
        trainer.add_callback(EvaluationCallback(recipe.evaluation, trainer))
    if teacher is not None and vocabulary is not None:
        trainer.accelerator.print(
            f"{'one encoding serves both models' if collator.shared else 'each model has its own token stream'}; "
            f"{len(vocabulary):,} shared tokens (heads of {head_rows(student):,} and {teacher.head_rows:,} rows)"
        )
    return trainer


def _student(recipe: Recipe, collator: PairedCollator) -> Any:
    """The student, which ends what it generates where its rows end: a base model knows no end of turn."""
    student = load_student(recipe.student)
    if student.generation_config is not None:
        known = student.generation_config.eos_token_id
        stops = [] if known is None else known if isinstance(known, list) else [known]
        student.generation_config.eos_token_id = [*stops, *sorted(collator.student.stop_ids - set(stops))] or None
    return student


def _stream(recipe: Recipe, collator: PairedCollator, arguments: DistillationArguments) -> StreamedBatches:
    arguments.ignore_data_skip = True  # the stream knows its place
    rows = StreamedRows(
        recipe.data.train,
        on_bad_row=recipe.data.on_bad_row,
        allow_urls=recipe.data.allow_urls,
        seed=arguments.seed,
        shuffled=arguments.train_sampling_strategy == "random",
    )
    return StreamedBatches(
        rows,
        collator,
        arguments.train_batch_size,
        capacity=recipe.data.max_length if recipe.data.packing else None,
        rank=arguments.process_index,
        world=arguments.world_size,
        workers=arguments.dataloader_num_workers,
    )


def _checkpoint(arguments: DistillationArguments, recipe: Recipe, output: Path) -> Path | None:
    """Where to go on from.

    Raises:
        InputError: the folder holds a run of another recipe, or of another number of ranks under DeepSpeed, or the
            named checkpoint is not whole.
    """
    if arguments.resume == "never":
        return None
    if arguments.resume == "auto":
        found = newest_whole(output, transformers.logging.get_logger(__name__).warning)
        changed = [section for section in _changed(recipe, output) if section != "training"]
        if found is not None and changed:
            raise InputError(
                f"{output} holds a run of another recipe (it differs in {', '.join(changed)}): choose another "
                "training.output_dir, or start anew with training.resume: never"
            )
    else:
        found = Path(arguments.resume)
        if problem := broken(found):
            raise InputError(f"training.resume: {found} is no whole checkpoint: {problem}")
    ranks = None if found is None else json.loads((found / MANIFEST).read_text())["world_size"]
    if arguments.deepspeed and ranks not in (None, arguments.world_size):
        raise InputError(
            f"{found} was written by {ranks} ranks and DeepSpeed's state is split over them: launch {ranks} ranks, or "
            "start anew with training.resume: never"
        )
    return found


def _changed(recipe: Recipe, output: Path) -> list[str]:
    """The sections in which the recipe differs from the one that the folder's run was made with."""
    before = output / "recipe.yaml"
    if not before.is_file():
        return []
    old, new = yaml.safe_load(before.read_text()), json.loads(json.dumps(recipe.to_dict()))
    for sections in (old, new):
        sections["training"].pop("resume", None)
        sections.pop("evaluation", None)  # it changes no weight
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _report_refused(trainer: DistillationTrainer, output: Path) -> None:
    refused = trainer.all_refused()
    if refused and trainer.is_world_process_zero():
        lines = "".join(
            json.dumps({"row": row, "times": times}, ensure_ascii=False) + "\n" for row, times in refused.items()
        )
        (output / "refused_rows.jsonl").write_text(lines)
        first = next(iter(refused))
        trainer.accelerator.print(
            f"{len(refused)} rows were skipped (refused_rows.jsonl lists them), the first: {first}"
        )
