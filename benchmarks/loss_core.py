"""The loss core against its rivals: forward and backward from hidden states, the head's gradient included.

Each contender runs in a process of its own, so that its peak memory is its own. A line of JSON is added to --output:

    python benchmarks/loss_core.py run --case qwen --share 0.25 --output benchmarks/loss_core.jsonl
    python benchmarks/loss_core.py lengths --case qwen --share 0.25 --output benchmarks/loss_core.jsonl
    python benchmarks/loss_core.py precision --logits real --folder runs/smollm2 --output benchmarks/precision.jsonl

Rivals: pip install "vlm-taid[bench]". They are not needed for anything else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# B, T, vocabulary, student width, teacher width
CASES = {
    "qwen": (2, 1024, 151936, 1536, 3584),
    "smollm": (2, 1024, 49152, 576, 2048),
    "internvl": (2, 1024, 92553, 2048, 4096),
}
INTERPOLATION = 0.4


def authors(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """The formula of the authors' script: whole logits in the models' precision, then softmax in fp32."""
    logits = hidden_s @ weight_s.T
    with torch.no_grad():
        target = torch.lerp(logits.detach(), hidden_t @ weight_t.T, INTERPOLATION).softmax(-1, dtype=torch.float32)
    log_q = F.log_softmax(logits, -1, dtype=torch.float32)
    per_token = -(target * log_q).sum(-1)
    return (per_token * mask).sum() / mask.sum()


def trl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """TRL as its trainer calls it off a GPU: all positions, masked afterwards. Forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(hidden_s, weight_s, None, hidden_t, weight_t, None, 0.0, 1.0)
    return per_token.masked_fill(~mask, 0.0).sum() / mask.sum()


def trl_rows(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """TRL, given the supervised rows alone, as its trainer does on a GPU."""
    rows = torch.ones(int(mask.sum()), dtype=torch.bool)
    return trl(hidden_s[mask], weight_s, hidden_t[mask], weight_t, rows)


def liger(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """Liger's fused linear JSD, forward KL (beta 0), all rows, without torch.compile."""
    return _liger(hidden_s, weight_s, hidden_t, weight_t, mask, compiled=False)


def liger_compiled(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """The same with torch.compile, Liger's default; compiling is not timed."""
    return _liger(hidden_s, weight_s, hidden_t, weight_t, mask, compiled=True)


def _liger(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor, **options) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **options)
    labels = torch.where(mask, 0, -100)
    return loss(hidden_s, weight_s, hidden_t, weight_t, labels)


def ours(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """linear_distillation on the supervised rows: TAID."""
    return _ours(hidden_s, weight_s, hidden_t, weight_t, mask, "taid")


def ours_fkl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """The same with the rivals' objective, for the comparison of gradients."""
    return _ours(hidden_s, weight_s, hidden_t, weight_t, mask, "fkl")


def ours_recomputed(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor) -> Tensor:
    """Ours with the gradient made in backward, from logits that are computed once more: what it would cost."""
    return _Recomputed.apply(hidden_s, weight_s, hidden_t, weight_t, mask)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return ours(*inputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        hidden_s, weight_s, *others = ctx.saved_tensors
        wanted = hidden_s.detach().requires_grad_(), weight_s.detach().requires_grad_()
        with torch.enable_grad():
            found = torch.autograd.grad(ours(*wanted, *others), wanted, gradients[0])
        return *found, None, None, None


def _ours(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, mask: Tensor, name: str) -> Tensor:
    from vlm_taid.objectives import Head, HiddenSignal, Objective, linear_distillation

    target = HiddenSignal(hidden_t[mask], Head(weight_t))
    objective = Objective.named(name)
    return linear_distillation(hidden_s[mask], Head(weight_s), target, objective, t=INTERPOLATION).loss_N.sum()


CONTENDERS = {f.__name__: f for f in (authors, trl, trl_rows, liger, liger_compiled, ours, ours_recomputed, ours_fkl)}
LENGTHS = (512, 1024, 2048, 4096, 8192)
LONG = 30.0  # seconds: a longer pass is not repeated


def measure(contender: str, case: str, share: float, length: int | None, threads: int) -> dict[str, float | str]:
    """One forward and backward in this process: the least seconds of three, GiB at the last one's peak beyond inputs.

    Each pass begins without gradients. A long one is not repeated, unless it compiles.
    """
    torch.set_num_threads(threads)
    hidden_s, weight_s, hidden_t, weight_t, mask = _inputs(case, share, length)
    function = CONTENDERS[contender]
    few = torch.ones(8, dtype=torch.bool)  # imports and first calls are not timed
    function(hidden_s[:8].clone().requires_grad_(), weight_s[:64], hidden_t[:8], weight_t[:64], few).backward()
    hidden_s, weight_s = hidden_s.requires_grad_(), weight_s.requires_grad_()
    seconds, cpu_seconds, peak = [], [], 0.0
    while len(seconds) < 3 and (not seconds or seconds[-1] < LONG or contender == "liger_compiled"):
        hidden_s.grad = weight_s.grad = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier passes have freed is not in this one's peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began, cpu_began = _memory("VmRSS"), time.perf_counter(), time.process_time()
        function(hidden_s, weight_s, hidden_t, weight_t, mask).backward()
        cpu_seconds.append(time.process_time() - cpu_began)
        seconds.append(time.perf_counter() - began)
        peak = _memory("VmHWM") - before
        assert hidden_s.grad is not None and weight_s.grad is not None
    return {
        "contender": contender, "case": case, "share": share, "length": mask.numel() // CASES[case][0],
        "answers": int(mask.sum()), "seconds": round(min(seconds), 2), "cpu_seconds": round(min(cpu_seconds), 2),
        "GiB": round(peak, 3), "passes": len(seconds), "threads": threads,
    }  # fmt: skip


def _inputs(case: str, share: float, length: int | None) -> list[Tensor]:
    """Student's hidden states and head, the teacher's, and which positions are answers; of another length, as many."""
    B, T, V, H, G = CASES[case]
    generator = torch.Generator().manual_seed(0)
    positions = B * (length or T)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(generator=generator).mul_(scale)

    hidden_s, hidden_t = normal(positions, H, scale=1.0), normal(positions, G, scale=1.0)
    weight_s, weight_t = normal(V, H, scale=H**-0.5), normal(V, G, scale=G**-0.5)
    mask = torch.zeros(positions, dtype=torch.bool)
    mask[torch.randperm(positions, generator=generator)[: round(share * B * T)]] = True
    return [hidden_s, weight_s, hidden_t, weight_t, mask]


def lengths(case: str, share: float, threads: int, turns: int) -> dict[str, object]:
    """What depends on the number of positions, at as many answers: to gather these, and to give the gradient back.

    In turns, the least milliseconds of each; beside it the least seconds of ours on the gathered rows. (Whole passes
    of different lengths differ by a machine's drift alone.)
    """
    torch.set_num_threads(threads)
    B, T, _, H, G = CASES[case]
    inputs = {}
    for length in LENGTHS:
        hidden_s, mask = torch.ones(B * length, H, dtype=torch.bfloat16), torch.zeros(B * length, dtype=torch.bool)
        mask[torch.randperm(B * length)[: round(share * B * T)]] = True
        inputs[length] = (hidden_s.requires_grad_(), torch.ones(B * length, G, dtype=torch.bfloat16), mask)
    milliseconds: dict[str, float] = {}
    for _ in range(turns):
        for length, (hidden_s, hidden_t, mask) in inputs.items():
            hidden_s.grad = None
            began = time.perf_counter()
            rows = hidden_s[mask]
            _ = hidden_t[mask]
            rows.backward(rows.detach())
            taken = round(1e3 * (time.perf_counter() - began), 1)
            milliseconds[str(length)] = min(taken, milliseconds.get(str(length), taken))
    loss = measure("ours", case, share, None, threads)["seconds"]
    return {"case": case, "share": share, "milliseconds": milliseconds, "loss": loss, "turns": turns}


def _memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def real_inputs(folder: Path, rows: int) -> list[Tensor]:
    """Hidden states at ``rows`` positions of held-out text and both heads, all in bf16, of data/smollm2.py's models.

    The positions are spread evenly over the first texts, each cut at 128 tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    texts = [json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()[:16]]
    encoded = [tokenizer(text, truncation=True, max_length=128, return_tensors="pt").input_ids for text in texts]
    found = []
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            hidden_NH = torch.cat([model.model(ids_1T).last_hidden_state[0, :-1] for ids_1T in encoded])
        at = torch.linspace(0, len(hidden_NH) - 1, rows).round().long()
        found += [hidden_NH[at], model.lm_head.weight.detach()]
    return found


def precision(logits: str, folder: Path | None, contenders: list[str]) -> list[dict[str, float | str]]:
    """Relative error of each contender's gradients against fp64 autograd, weights and hidden states in bf16.

    The plain error, and that after the gradient is multiplied by the one number that fits best, so that a mean over
    something else is no error.

    logits: ``normal``: N(0, 1) logits over V = 151936; ``real``: a teacher and its pruned student on real text, which
    ``data/smollm2.py --output folder`` writes.
    """
    if logits == "normal":
        generator = torch.Generator().manual_seed(0)
        n, V, H, G = 32, 151936, 64, 64  # narrow, so that the fp64 reference fits
        hidden_s, hidden_t = (torch.randn(n, width, generator=generator) for width in (H, G))
        weight_s, weight_t = (torch.randn(V, width, generator=generator) * width**-0.5 for width in (H, G))
        inputs = [x.bfloat16() for x in (hidden_s, weight_s, hidden_t, weight_t)]
    else:
        assert folder is not None, "--logits real needs --folder"
        inputs = real_inputs(folder, 256)
    rows = torch.ones(len(inputs[0]), dtype=torch.bool)
    exact = {name: _exact(inputs, name) for name in ("fkl", "taid")}
    found = []
    for contender in contenders:
        hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
        loss = CONTENDERS[contender](hidden, weight, inputs[2], inputs[3], rows)
        (loss / len(rows) if contender.startswith("ours") else loss).backward()
        line = {"contender": contender, "logits": logits, "rows": len(rows)}
        references = exact["taid" if contender in ("ours", "ours_recomputed", "authors") else "fkl"]
        for name, gradient, reference in zip(("hidden", "head"), (hidden.grad, weight.grad), references, strict=True):
            assert gradient is not None
            gradient = gradient.double()
            fitted = gradient * ((gradient * reference).sum() / gradient.square().sum())
            for what, one in (("plain", gradient), ("fitted", fitted)):
                line[f"{name} {what} %"] = round(float(100 * (one - reference).norm() / reference.norm()), 3)
        found.append(line)
    return found


def _exact(inputs: list[Tensor], name: str) -> list[Tensor]:
    """Gradients in the hidden states and the head, by autograd in fp64."""
    hidden, weight = (x.double().requires_grad_() for x in inputs[:2])
    logits = hidden @ weight.T
    target = inputs[2].double() @ inputs[3].double().T
    if name == "taid":
        target = torch.lerp(logits.detach(), target, INTERPOLATION)
    (-(target.softmax(-1) * logits.log_softmax(-1)).sum() / len(hidden)).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [hidden.grad, weight.grad]


def plot(lines: Path, case: str, share: float, picture: Path) -> None:
    """Seconds and memory of one case and share, a bar a contender; of a contender's lines the last counts."""
    import matplotlib.pyplot as plt

    wanted = {"case": case, "share": share, "length": CASES[case][1]}
    measured = [json.loads(line) for line in lines.read_text().splitlines()]  # and others, of lengths and precision
    last = {line["contender"]: line for line in measured if wanted.items() <= line.items()}
    names = [name for name in CONTENDERS if name in last]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.6 + 0.45 * len(names)), sharey=True, layout="constrained")
    for panel, key, label in zip(panels, ("seconds", "GiB"), ("seconds", "GiB beyond the inputs"), strict=True):
        colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
        bars = panel.barh(names, [last[name][key] for name in names], color=colours)
        panel.bar_label(bars, padding=3)
        panel.margins(x=0.15)
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    B, T, V, H, G = CASES[case]
    figure.suptitle(f"{share:.0%} of {B} x {T} positions, V {V}, widths {H} and {G}, forward and backward")
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "one", "lengths", "precision", "plot"])
    parser.add_argument("--case", choices=CASES, default="qwen")
    parser.add_argument("--share", type=float, default=0.25, help="share of the positions that are supervised")
    parser.add_argument("--length", type=int, help="positions a row, at a fixed number of answer tokens")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logits", choices=["normal", "real"], default="normal")
    parser.add_argument("--folder", type=Path, help="what data/smollm2.py wrote, for --logits real")
    parser.add_argument("--output", type=Path, default=Path("/dev/stdout"))
    parser.add_argument("--turns", type=int, default=20, help="of lengths")
    parser.add_argument("--lines", type=Path, help="what plot reads; it writes --output")
    options = parser.parse_args()
    if options.what == "plot":
        plot(options.lines, options.case, options.share, options.output)
        return
    lines: Iterator[Any]
    if options.what == "one":
        lines = iter([measure(options.contenders[0], options.case, options.share, options.length, options.threads)])
    elif options.what == "lengths":
        lines = iter([lengths(options.case, options.share, options.threads, options.turns)])
    elif options.what == "precision":
        lines = iter(precision(options.logits, options.folder, options.contenders))
    else:
        lines = _each_apart(options)
    for line in lines:  # a long run that is stopped has its first lines
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _each_apart(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    for contender in options.contenders:
        arguments = ["--case", options.case, "--share", str(options.share), "--threads", str(options.threads)]
        arguments += ["--length", str(options.length)] if options.length else []
        command = [sys.executable, __file__, "one", "--contenders", contender, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
