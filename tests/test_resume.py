"""A run that is killed goes on bit for bit: weights, t, momentum, order of the rows."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests import families, runs
from vlm_taid.checkpoints import alone_in, broken, newest_whole
from vlm_taid.distillation import distill
from vlm_taid.errors import InputError
from vlm_taid.recipe import Recipe

LONG = {"max_steps": 60, "save_strategy": "steps", "save_steps": 10, "dataloader_num_workers": 1}
STATE = ("step", "loss", "t", "delta_t", "momentum")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student with dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("resume")
    student = families.llama(folder / "student", seed=1, width=16, attention_dropout=0.2)
    teacher = families.llama(folder / "teacher")
    # several epochs in one process; on 2 ranks one, because a worker that is forked beside gloo's threads can hang in
    # CPython 3.11.2, and each epoch forks anew
    short = families.vqa_rows(folder / "short", rows=26, images=False)
    long = families.vqa_rows(folder / "long", rows=250, images=False)

    def recipe(name, **more):
        data = long if "deepspeed" in more else short
        return runs.recipe_file(folder / f"{name}.yaml", student, teacher, data, **(LONG | more))

    return recipe


def equal(run, reference):
    ours, theirs = runs.weights(run), runs.weights(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert runs.metrics(run, *STATE) == runs.metrics(reference, *STATE)
    schedules = [
        json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["DistillationState"]
        for folder in (run, reference)
    ]
    assert schedules[0] == schedules[1]


def logged(run, step):
    def reached():
        return (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count('"loss"') >= step

    return reached


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_ends_as_if_it_had_not_been(pair, ranks):
    launcher = {1: None, 2: "deepspeed"}[ranks]
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if ranks == 1 else {}
    more |= {"deepspeed": runs.deepspeed_config(2), "per_device_train_batch_size": 2} if ranks == 2 else {}
    whole = pair(f"whole{ranks}", **more)
    reference = runs.here(whole) if ranks == 1 else runs.launched(whole, launcher)
    killed = pair(f"killed{ranks}", **more)
    step = random.SystemRandom().randint(12, 45)
    run = runs.launched(killed, launcher, kill_when=logged(runs.output_of(killed), step))
    assert not (run / "complete.json").exists() and newest_whole(run) is not None
    runs.here(killed) if ranks == 1 else runs.launched(killed, launcher)
    equal(run, reference)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_every_rank_exits_zero(pair, ranks):
    """The signal goes to the ranks and their DataLoader workers, as launchers send it."""
    more = {"deepspeed": runs.deepspeed_config(2), "per_device_train_batch_size": 2} if ranks == 2 else {}
    recipe, whole = pair(f"terminated{ranks}", **more), pair(f"not_terminated{ranks}", **more)
    run, launcher = runs.output_of(recipe), "deepspeed" if ranks == 2 else None
    reference = runs.launched(whole, launcher) if ranks == 2 else runs.here(whole)
    log = recipe.with_suffix(".log")
    process = psutil.Popen(runs.command(recipe, launcher), stdout=log.open("w"), stderr=subprocess.STDOUT)
    reached = logged(run, 15)
    while not reached():
        assert process.poll() is None
        time.sleep(0.01)

    def ranks_and_workers():
        found = []
        for candidate in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):  # a child may just have ended
                line = candidate.cmdline()
                found += [candidate] if "vlm_taid" in line and "deepspeed" not in " ".join(line[:5]) else []
        return found

    mine = ranks_and_workers()
    while len(mine) < 2 * ranks:  # between two epochs there are no workers
        assert process.poll() is None
        mine = ranks_and_workers()
    for victim in mine:
        victim.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()[-4000:]
    assert not (run / "complete.json").exists()
    checkpoint = newest_whole(run)
    assert checkpoint is not None  # saved where it was stopped
    assert f"stopped by SIGTERM after step {checkpoint.name.split('-')[1]}:" in log.read_text()
    runs.launched(recipe, launcher) if ranks == 2 else runs.here(recipe)
    equal(run, reference)


def test_killed_while_the_last_model_is_written(pair):
    """All steps are done and saved: nothing is trained again."""
    recipe = pair("late", max_steps=20)
    run = runs.here(recipe)
    before = runs.weights(run)
    (run / "complete.json").unlink()
    (run / "model.safetensors").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1.0, "st')  # half a line, as a killed run leaves it
    runs.here(recipe)
    assert all(torch.equal(before[key], value) for key, value in runs.weights(run).items())
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 20
    assert not (run / ".partial").exists()


def test_broken_checkpoint_is_passed_over(pair):
    recipe = pair("broken", max_steps=20)
    reference = runs.here(pair("not_broken", max_steps=20))
    run = runs.here(recipe)
    (run / "complete.json").unlink()
    optimizer = run / "checkpoint-20" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert "optimizer.pt" in (broken(run / "checkpoint-20") or "")
    told = []
    assert newest_whole(run, told.append) == run / "checkpoint-10"
    assert "checkpoint-20" in told[0]
    runs.here(recipe)
    equal(run, reference)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder whose room the test sets: a file system of its own; where none can be mounted (that takes root and
    Linux), files that torch writes beyond it are cut and fail as there."""
    mounted, room, save = True, [0], torch.save

    def resize(size: int, how: str = "remount") -> None:
        room[0] = size
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how},size={size}", "tmpfs", str(tmp_path)], check=True)

    def save_in_room(what, file, *arguments, **options):
        save(what, file, *arguments, **options)
        over = sum(one.stat().st_size for one in tmp_path.rglob("*") if one.is_file()) - room[0]
        if tmp_path in Path(file).parents and over > 0:
            os.truncate(file, max(0, Path(file).stat().st_size - over))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    try:
        resize(2**20, "rw")
    except (OSError, subprocess.CalledProcessError):
        mounted = False
        monkeypatch.setattr(torch, "save", save_in_room)
    yield tmp_path, resize
    if mounted:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(pair, small_disk):
    sizes = {"max_steps": 20, "save_steps": 10}
    folder, resize = small_disk
    reference = runs.here(pair("enough_room", **sizes))
    one = sum(file.stat().st_size for file in (reference / "checkpoint-20").iterdir())
    resize(one * 3 // 2)
    recipe = pair("full", output_dir=str(folder / "run"), **sizes)
    with pytest.raises(InputError, match=r"the disk is full .*checkpoint-10 is whole: free space"):
        runs.here(recipe)
    run = folder / "run"
    assert newest_whole(run) == run / "checkpoint-10" and not (run / ".partial").exists()
    resize(one * 9)
    equal(runs.here(recipe), reference)


def test_half_written_checkpoint_is_never_taken(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert newest_whole(tmp_path, lambda message: None) is None


def test_complete_run_is_left_alone(pair, capsys):
    recipe = pair("complete", max_steps=10)
    written = (runs.here(recipe) / "model.safetensors").stat().st_mtime_ns
    assert (runs.here(recipe) / "model.safetensors").stat().st_mtime_ns == written
    assert "is complete" in capsys.readouterr().out
    again = distill(Recipe.load(recipe, ["--training.resume", "never"]))
    assert (again / "model.safetensors").stat().st_mtime_ns > written


def test_another_recipe_in_the_same_folder_is_refused(pair):
    recipe = pair("mine", max_steps=10)
    runs.here(recipe)
    with pytest.raises(InputError, match="objective"):
        distill(Recipe.load(recipe, ["--objective.t_start", "0.6"]))


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    """As when a launcher alone was killed and its ranks go on."""
    hold = (
        "import sys; from vlm_taid.checkpoints import *\nwith alone_in(Path(sys.argv[1])): print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    with pytest.raises(InputError, match=f"another process .*process {other.pid} on .*end it"), alone_in(tmp_path, 0.1):
        pass
    other.kill()
    other.wait()
    with alone_in(tmp_path, 0):
        pass


def test_private_methods_of_the_trainer_are_still_there():
    from transformers import Trainer

    for name in (
        "_save_checkpoint",
        "_load_optimizer_and_scheduler",
        "create_accelerator_and_postprocess",
        "_init_training_state",
        "_get_output_dir",
        "get_batch_samples",
        "evaluation_loop",
        "_run_epoch",
    ):
        assert callable(getattr(Trainer, name))


def test_t_does_not_move_in_evaluation(pair):
    recipe = pair("evaluated", max_steps=8, eval_strategy="steps", eval_steps=1)
    content = recipe.read_text().replace("  on_bad_row", "  validation:\n  - {format: vqa, path: %s}\n  on_bad_row")
    data = next(line.split("path: ")[1] for line in content.splitlines() if "path:" in line and ".jsonl" in line)
    recipe.write_text(content % data)
    run, plain = runs.here(recipe), runs.here(pair("unevaluated", max_steps=8))
    assert len(runs.metrics(run, "eval_loss")) == 8
    assert runs.metrics(run, "step", "t", "momentum") == runs.metrics(plain, "step", "t", "momentum")


def test_resumed_run_passes_over_bad_rows_as_the_whole_one_does(pair, tmp_path):
    """The step after the checkpoint has no answer token, and as many rows were refused by then as there are."""
    rows = [{"question": "what is it?", "answer": answer} for answer in ("a circle", "", "", "")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = families.llama(tmp_path / "student", seed=1, width=16), families.llama(tmp_path / "teacher")
    more = {"max_steps": 8, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    saved = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 4}
    whole = runs.here(runs.recipe_file(tmp_path / "whole.yaml", student, teacher, str(data), **more, **saved))
    again = {"resume": str(whole / "checkpoint-5")}
    part = runs.here(runs.recipe_file(tmp_path / "part.yaml", student, teacher, str(data), **more, **again))
    assert runs.metrics(part, "step", "loss") == runs.metrics(whole, "step", "loss")[5:]
