"""One thread a process and no hub: what the tests assume, set before torch and the hub client are imported."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))  # the scripts that fetch pinned packages
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch

torch.set_num_threads(1)
