"""How fast `vlm-taid eval run` answers easy-VQA's 9,673 held-out questions, on one rank and on two.

    python benchmarks/evaluation.py --run runs/quickstart          # what scripts/quickstart.sh leaves

Each rank has one thread and reads its rows in its own process. The aims: 60 s on two cores, two ranks at least 1.6
times as fast as one, and the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = "from vlm_taid.cli import main; import sys, torch; torch.set_num_threads(1); sys.exit(main(sys.argv[1:]))"


def timed(ranks: int, model: Path, data: Path, batch_size: int, limit: int | None, output: Path) -> dict:
    """One run of the command: its results file's numbers, and the process's seconds, on the clock and of CPU."""
    script = output / "command.py"
    output.mkdir(parents=True)
    script.write_text(COMMAND)
    words = ["eval", "run", "--model", str(model), "--data", f"easy_vqa={data}", "--metric", "exact_match"]
    words += ["--batch_size", str(batch_size), "--max_new_tokens", "4", "--num_workers", "0"]
    words += ["--output_path", str(output)] + ([] if limit is None else ["--limit", str(limit)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run(
        [sys.executable, *launcher, str(script), *words], env=environment, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    results = json.loads(next(output.rglob("results_*.json")).read_text())
    samples = [json.loads(line) for line in next(output.rglob("samples_*.jsonl")).read_text().splitlines()]
    seconds = results["run"]["seconds"]
    return {
        "ranks": ranks,
        "questions": len(samples),
        "seconds": seconds,
        "wall": round(wall, 1),
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load": round(os.getloadavg()[0], 1),
        "per_second": round(len(samples) / seconds, 1),
        "score": results["results"]["easy_vqa"]["exact_match,none"],
        "answers": [sample["filtered_resps"][0] for sample in samples],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the quickstart's folder")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            timed(ranks, options.run / "taid", options.run / "data" / "test.jsonl", options.batch_size, options.limit,
                  Path(folder) / str(ranks))
            for ranks in (1, 2)
        ]  # fmt: skip
    one, two = (run.pop("answers") for run in found)
    for run in found:
        print(json.dumps(run))
    different = sum(a != b for a, b in zip(one, two, strict=True))
    print(
        f"two ranks / one rank: {found[1]['per_second'] / found[0]['per_second']:.2f}; different answers: {different}"
    )


if __name__ == "__main__":
    main()
