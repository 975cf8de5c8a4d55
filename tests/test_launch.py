"""Two 'nodes' on this machine: two launchers, one rendezvous on the loopback address."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.families import llama, vqa_rows
from tests.runs import deepspeed_config, free_port, here, metrics, output_of, recipe_file

SCRIPTS = Path(__file__).parents[1] / "scripts"


def node(recipe: Path, number: int, port: str) -> subprocess.Popen:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "NODES": "2", "NODE": str(number),
        "MASTER": "127.0.0.1", "PORT": port, "GPUS": "1",
    }  # fmt: skip
    with open(recipe.with_suffix(f".{number}.log"), "w") as log:
        command = ["bash", str(SCRIPTS / "launch_node.sh"), "--config", str(recipe)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def two_nodes(recipe: Path) -> list[subprocess.Popen]:
    port = free_port()
    return [node(recipe, number, port) for number in (0, 1)]


def test_two_nodes_train_as_one_process_and_go_on_after_sigterm(tmp_path):
    data = vqa_rows(tmp_path / "data", images=False, rows=8)
    models = llama(tmp_path / "student", seed=1), llama(tmp_path / "teacher")
    sizes = {"max_steps": 400, "save_strategy": "steps", "save_steps": 1000, "use_cpu": True, "learning_rate": 1e-4}
    recipe = recipe_file(
        tmp_path / "nodes.yaml", *models, data, deepspeed=deepspeed_config(2), per_device_train_batch_size=2, **sizes
    )
    nodes = two_nodes(recipe)
    run = output_of(recipe)
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(metrics(run, "loss")) < 4:
        assert all(one.poll() is None for one in nodes), recipe.with_suffix(".0.log").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    for one in nodes:
        one.send_signal(signal.SIGTERM)
    for one in nodes:
        one.wait(120)
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 4 <= step < 400 and (checkpoint / "complete.json").is_file() and not (run / "complete.json").exists()

    text = recipe.read_text().replace("max_steps: 400", f"max_steps: {step + 2}")
    recipe.write_text(text)
    assert [one.wait(120) for one in two_nodes(recipe)] == [0, 0], recipe.with_suffix(".0.log").read_text()[-3000:]
    assert (run / "complete.json").is_file()
    alone = recipe_file(
        tmp_path / "alone.yaml", *models, data, per_device_train_batch_size=4, **sizes | {"max_steps": step + 2}
    )
    theirs = [value for (value,) in metrics(run, "loss")]
    ours = [value for (value,) in metrics(here(alone), "loss")]
    assert len(theirs) == len(ours) == step + 2
    assert abs(theirs[0] - ours[0]) < 1e-4 * ours[0]
