"""Benchmarks of lm-eval, in this process: the model by its own back ends, the tasks by their names there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_taid.errors import InputError
from vlm_taid.evaluation.models import resolve_device, resolve_dtype
from vlm_taid.pretrained import check_folder, check_weights, load_processor


def run_lm_eval(
    model: str,
    tasks: str,
    flags: Sequence[str] = (),
    *,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    output_path: str | Path | None = None,
    log_samples: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Runs ``lm-eval run``, which prints its table and writes its files: ``OUTPUT/<model>/results_<time>.json``, ...

    The back end is ``hf``, or ``hf-multimodal`` for a model whose processor takes pictures.

    Args:
        model: model folder or hub name.
        tasks: names of tasks or groups, with commas between.
        flags: any further flags of ``lm-eval run``; ``--model_args`` are added to the model's own.
        batch_size, device, dtype, limit, output_path, log_samples, trust_remote_code: as in ``eval run``.

    Raises:
        InputError: lm-eval is not installed, or refuses the tasks or flags; the model folder is none.
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("eval lm --tasks needs lm-eval: pip install 'vlm-taid[lm-eval]'") from error
    check_folder(model)
    check_weights(model)
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    where = resolve_device(device)
    kind = "hf" if getattr(processor, "image_processor", None) is None else "hf-multimodal"
    words = ["lm-eval", "run", "--model", kind, "--tasks", tasks, "--batch_size", str(batch_size)]
    words += ["--device", str(where)]
    words += ["--model_args", f"pretrained={model},dtype={resolve_dtype(dtype, where)}"]
    words += [] if limit is None else ["--limit", str(limit)]
    words += ["--trust_remote_code"] if trust_remote_code else []
    if output_path is not None:
        words += ["--output_path", str(output_path), *(["--log_samples"] if log_samples else [])]
    kept, sys.argv = sys.argv, [*words, *flags]
    try:
        cli_evaluate()
    except (SystemExit, ValueError) as error:  # argparse has said why
        if isinstance(error, SystemExit) and not error.code:
            return
        raise InputError(f"lm-eval refuses `{' '.join(sys.argv)}`: {error}") from error
    finally:
        sys.argv = kept
