"""What a teacher under its own ZeRO-3 holds while its layers run; one rank, in a process of its own."""

import json
import os
import subprocess
import sys

from tests import families, runs

SCRIPT = """
import json, sys
import deepspeed, torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from vlm_taid.objectives import redirected
from vlm_taid.teachers import TeacherOptions
from vlm_taid.teachers.live import LiveTeacher, hidden_at

deepspeed.init_distributed("gloo", verbose=False)
zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
zero |= {"stage3_max_live_parameters": 0}
options = TeacherOptions(sys.argv[1], dtype="bfloat16", zero_stage=3, deepspeed={"zero_optimization": zero})
teacher = LiveTeacher(options, torch.device("cpu"))


def whole():
    return [name for name, p in teacher.model.named_parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]


def note(*_):
    seen.append(whole())


seen = [whole()]
teacher.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(note)
batch = {"teacher": {"input_ids": torch.arange(3, 20)[None]}, "teacher_rows_N": torch.arange(4)}
for _ in range(3):
    teacher.signal(batch)
    with teacher.gathered():
        note()
    note()
print(json.dumps(seen))
"""


def test_head_is_whole_no_longer_than_a_loss_takes(tmp_path):
    teacher = families.qwen2(tmp_path / "teacher")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", SCRIPT, teacher]
    variables = os.environ | rank | {"MASTER_PORT": runs.free_port()}
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=runs.LIMIT)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen == [[], *[["model.layers.1.self_attn.o_proj.weight"], ["lm_head.weight"], []] * 3]
