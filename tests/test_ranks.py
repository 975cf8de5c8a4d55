import subprocess
import sys

import pytest

BEGUN_INSIDE = """
import torch.distributed as dist
from vlm_taid import cli, ranks

released = []
ranks.time.sleep = released.append

def begin(): dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def command(arguments):
    if not dist.is_initialized(): begin()
    return CODE

cli.COMMANDS["distill"] = command
"""


@pytest.mark.parametrize(
    ("rank", "before", "code", "left"),
    [(True, False, 0, True), (True, True, 0, False), (False, False, 0, False), (True, False, 2, False)],
)
def test_a_rank_leaves_the_group_that_its_command_began(rank, before, code, left):
    """And lets gloo's threads have Python's lock before the interpreter ends: those that get it later abort it.

    After a failure it waits for nobody.
    """
    script = f"""{BEGUN_INSIDE}
CODE = {code}
if {before}: begin()
assert cli.main(["distill"]) == {code}
assert dist.is_initialized() is not {left}
assert released == {[0.5] if left else []}
"""
    _run(script, {"LOCAL_RANK": "0"} if rank else {})


@pytest.mark.parametrize("joined", [True, False])
def test_a_failure_inside_leaves_the_group_that_was_joined_for_it(joined):
    script = f"""{BEGUN_INSIDE}
given = dist.init_process_group
dist.init_process_group = lambda backend: given(backend, store=dist.HashStore(), rank=0, world_size=1)
if not {joined}: dist.init_process_group("gloo")
try:
    with ranks.process_group() as first:
        assert first and dist.is_initialized()
        raise KeyError("rows")
except KeyError:
    assert dist.is_initialized() is not {joined}
    assert released == {[0.5] if joined else []}
else:
    raise AssertionError("the failure is to be seen")
"""
    _run(script, {"WORLD_SIZE": "2"})


def _run(script: str, environment: dict[str, str]) -> None:
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
