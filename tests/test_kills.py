"""A run that is interrupted ten times at random moments ends bit for bit as one that never was.

It accumulates, packs, streams with data workers, and runs on two ranks, under ZeRO-2 and under DDP. The seed of the
moments is printed; KILLS_SEED sets it.
"""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests import families, runs
from vlm_taid.checkpoints import PARTIAL, alone_in, newest_whole
from vlm_taid.errors import InputError
from vlm_taid.recipe import Recipe

SAVE, STEPS = 4, 120
MEASURED = ("seconds", "second", "gib", "runtime")  # parts of the names of logged numbers that differ from run to run
TRAINING = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE, "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1, "dataloader_num_workers": 1, "lr_scheduler_type": "cosine", "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two sources by weight, in shards; a student with dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("kills")
    student = families.llama(folder / "student", seed=1, width=16, attention_dropout=0.2)
    teacher = families.llama(folder / "teacher")
    for name, rows in (("many", 90), ("few", 30)):
        for shard in range(4):
            families.vqa_rows(folder / name, rows=rows, images=False, name=f"{shard}.jsonl")

    def made(name, launcher):
        more = {"deepspeed": runs.deepspeed_config(2)} if launcher == "deepspeed" else {}
        path = runs.recipe_file(folder / f"{name}.yaml", student, teacher, "unused", **TRAINING, **more)
        train = [{"path": str(folder / name), "weight": w, "format": "vqa"} for name, w in (("many", 2), ("few", 1))]
        data = ["--data.train", json.dumps(train), "--data.streaming", "true", "--data.packing", "true"]
        Recipe.load(path, [*data, "--data.max_length", "100"]).save(path)
        return path

    return made


@dataclass
class Moment:
    """When a run is interrupted, and how.

    Args:
        at: "starting" (from when the ranks are there), "training" or "saving" (while a checkpoint is written).
        number: SIGKILL or SIGTERM.
        victim: a rank, or None: the launcher.
        wait: seconds from then on; one that is "starting" is not let train more than six steps meanwhile.
        ahead: steps, or checkpoints, that are made before.
    """

    at: str
    number: signal.Signals
    victim: int | None
    wait: float
    ahead: int


def moments(seed: int) -> list[Moment]:
    draw = random.Random(seed)
    kinds = ["starting"] * 2 + ["training"] * 4 + ["saving"] * 4
    draw.shuffle(kinds)
    drawn = []
    for number, at in enumerate(kinds):
        wait = draw.uniform(0, {"starting": 8, "training": 0.3, "saving": 0.05}[at])
        ahead = draw.randint(0, 1) if at == "saving" else draw.randint(1, 6)
        name = signal.SIGTERM if number % 2 else signal.SIGKILL
        drawn.append(Moment(at, name, draw.choice([0, 1, None]), wait, ahead))
    return drawn


def trained(run: Path) -> int:
    """Steps that were trained, made again or not."""
    file = run / "rows0.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def checkpoint_of(run: Path) -> int:
    found = newest_whole(run)
    return 0 if found is None else int(found.name.split("-")[1])


def changed(folder: Path) -> int:
    return folder.stat().st_ctime_ns if folder.is_dir() else 0


def gone(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def family_of(process: psutil.Process) -> tuple[psutil.Process, list[psutil.Process]]:
    """The process that started the ranks, and the ranks; itself and none while they are not there."""
    ranks = {}
    for one in process.children(recursive=True):
        with suppress(psutil.Error, AttributeError):  # it or its parent may just have ended
            if "LOCAL_RANK" in one.environ() and "LOCAL_RANK" not in one.parent().environ():
                ranks[int(one.environ()["LOCAL_RANK"])] = one
    if len(ranks) < 2:
        return process, []
    return ranks[0].parent(), [ranks[0], ranks[1]]


def interrupted(recipe: Path, launcher: str, moment: Moment) -> str:
    """Runs until the moment, interrupts, and waits for the end; tells what happened."""
    run, log, clock = runs.output_of(recipe), recipe.with_suffix(".log"), time.monotonic()
    begun, before, partial = checkpoint_of(run), trained(run), changed(run / PARTIAL)
    with log.open("w") as file:
        command = runs.command(recipe, launcher, module="tests.each_rank")
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def reached() -> bool:
        if moment.at == "starting":
            return bool(family_of(process)[1])
        if moment.at == "training":
            return trained(run) >= before + moment.ahead
        return changed(run / PARTIAL) not in (0, partial) and trained(run) > before + SAVE * moment.ahead

    while not reached():
        assert process.poll() is None and time.monotonic() < clock + runs.LIMIT, log.read_text()[-4000:]
        time.sleep(0.002)
    end = time.monotonic() + moment.wait
    while time.monotonic() < end and not (moment.at == "starting" and trained(run) >= before + 6):
        time.sleep(0.002)
    parent, ranks = family_of(process)
    victim = parent if moment.victim is None or not ranks else ranks[moment.victim]
    everyone, steps = [process, *process.children(recursive=True)], trained(run) - before
    victim.send_signal(moment.number)
    sent = time.monotonic()
    if victim is parent and moment.number == signal.SIGKILL:
        if steps:  # the ranks go on without their launcher
            with pytest.raises(InputError, match="another process"), alone_in(run, patience=0):
                pass
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    status = process.wait(runs.LIMIT)
    end = time.monotonic() + runs.LIMIT
    while not all(gone(one) for one in everyone):
        assert time.monotonic() < end, [one for one in everyone if not gone(one)]
        time.sleep(0.05)
    said, kept = log.read_text(), checkpoint_of(run)
    if moment.number == signal.SIGTERM and moment.at != "starting":
        assert f"stopped by SIGTERM after step {kept}:" in said, said[-4000:]
        of_its_own = launcher == "torchrun" and victim is parent  # it ends by raising SignalException
        assert of_its_own or "Traceback" not in said, said[-4000:]
        assert kept > begun and (victim is parent or status == 0)
    name, left = f"rank {moment.victim}", ", .partial left" if (run / PARTIAL).is_dir() else ""
    return (
        f"{moment.number.name} to {'the launcher' if victim is parent else name}, {moment.at}: begun at step {begun}, "
        f"{steps} steps, kept step {kept}{left}; {sent - clock:.0f} s, and {time.monotonic() - sent:.0f} s to end"
    )


def same(ours, theirs) -> bool:
    """Equal bit for bit, down into containers and the objects that DeepSpeed keeps."""
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    if type(theirs).__eq__ is object.__eq__ and hasattr(theirs, "__dict__"):
        return type(ours) is type(theirs) and same(vars(ours), vars(theirs))
    return bool((ours == theirs) if not hasattr(theirs, "shape") else (ours == theirs).all())


def rows_of(run: Path, rank: int) -> dict[int, list]:
    """Of each step the rows of its micro-batches; steps that were made again read the same rows."""
    read = {}
    for line in (run / f"rows{rank}.jsonl").read_text().splitlines():
        with suppress(ValueError):  # a killed rank may have written half a line
            one = json.loads(line)
            assert read.setdefault(one["step"], one["rows"]) == one["rows"]
    return read


def logged(run: Path) -> list[dict]:
    """The log lines, but for what was measured, and for the sums that end each part of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "train_loss" not in line]
    return [{k: v for k, v in line.items() if not any(part in k for part in MEASURED)} for line in lines]


def equal(run: Path, reference: Path) -> None:
    """The model, the logs, the rows, and all of the last checkpoint: optimizer, t, momentum, random state, streams."""
    assert same(runs.weights(run), runs.weights(reference))
    assert logged(run) == logged(reference)
    for rank in (0, 1):
        assert rows_of(run, rank) == rows_of(reference, rank) and len(rows_of(run, rank)) == STEPS
    ours, theirs = (folder / f"checkpoint-{STEPS}" for folder in (run, reference))
    files = [path.relative_to(theirs) for path in theirs.rglob("*") if path.suffix in (".pt", ".pth", ".json")]
    assert len([file for file in files if file.suffix in (".pt", ".pth")]) >= 4
    for file in files:
        if file.suffix != ".json":
            a, b = (torch.load(folder / file, weights_only=False) for folder in (ours, theirs))
        else:
            a, b = (json.loads((folder / file).read_text()) for folder in (ours, theirs))
            for state in (a, b):
                state.pop("log_history", None)  # held against each other above
        assert same(a, b) or file.name == "complete.json", file  # sizes of what was measured


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_interrupted_ten_times(recipe, launcher):
    seed = int(os.environ.get("KILLS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\n{launcher}: KILLS_SEED={seed}")
    whole, broken = recipe(f"whole_{launcher}", launcher), recipe(f"broken_{launcher}", launcher)
    began = time.monotonic()
    reference = runs.launched(whole, launcher, module="tests.each_rank")
    print(f"the uninterrupted run: {time.monotonic() - began:.0f} s")
    run = runs.output_of(broken)
    for number, moment in enumerate(moments(seed), start=1):
        print(f"{number:2} {interrupted(broken, launcher, moment)}", flush=True)
        assert not (run / "complete.json").exists()
    runs.launched(broken, launcher, module="tests.each_rank")
    print(f"all of it: {time.monotonic() - began:.0f} s")

    equal(run, reference)
