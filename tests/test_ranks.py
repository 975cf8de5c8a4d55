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
    return 0

cli.COMMANDS["distill"] = command
"""


@pytest.mark.parametrize(("rank", "before", "left"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_rank_leaves_the_group_that_its_command_began(rank, before, left):
    """And lets gloo's threads have Python's lock before the interpreter ends: those that get it later abort it."""
    script = f"""{BEGUN_INSIDE}
if {before}: begin()
assert cli.main(["distill"]) == 0
assert dist.is_initialized() is not {left}
assert released == {[0.5] if left else []}
"""
    environment = {"LOCAL_RANK": "0"} if rank else {}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment | {"DS_ACCELERATOR": "cpu"}, timeout=120)
