"""The model `vlm_taid` of lmms-eval: its tasks, with our generation, so that answers are those of `vlm-taid eval run`.

lmms-eval finds it by the entry point in pyproject.toml; nothing else imports this file, which needs lmms-eval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from vlm_taid.data.formats import RowContext, messages
from vlm_taid.errors import InputError
from vlm_taid.evaluation.generation import Generation, generate, generation_options, padded, rendered, stop_tokens
from vlm_taid.evaluation.models import load, model_arguments
from vlm_taid.evaluation.readers import BATCHES_PER_WINDOW, Row, batches_of

MANIFEST = ModelManifest(model_id="vlm_taid", chat_class_path="vlm_taid.evaluation.lmms_plugin.LmmsModel")
LONGEST = 1024  # tokens of an answer where a task does not say
NOT_OURS = ("image_aspect_ratio",)  # for LLaVA's own code, in some tasks' generation_kwargs


class LmmsModel(lmms):
    """A model for lmms-eval: ``lmms-eval --model vlm_taid --model_args pretrained=PATH --tasks ...``.

    Args:
        pretrained: model folder or hub name.
        batch_size: rows in a batch, for each process.
        device: torch device, or auto.
        model_args: any of `vlm_taid.evaluation.models.MODEL_ARGS`.

    Raises:
        InputError: an argument cannot be used; see `load`.
    """

    is_simple = False  # tasks give chat messages

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str = "auto", **model_args: Any) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size {batch_size}: vlm_taid takes a whole number of at least 1")
        self.batch_size = int(batch_size)
        self.model, self.processor = load(pretrained, device=device, **model_arguments(model_args))
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.device = self.model.device
        self.stops = stop_tokens(self.model, self.tokenizer)

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answers to lmms-eval's requests, in their order.

        Raises:
            InputError: a task's generation_kwargs cannot be met, or a row cannot be asked.
        """
        alike: dict[str, list[int]] = {}  # requests by what they want of the generation
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(index)
        results: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="vlm_taid", unit="row", disable=self.rank > 0)
        for indices in alike.values():
            generation = self._generation(requests[indices[0]])
            window = BATCHES_PER_WINDOW * self.batch_size
            for start in range(0, len(indices), window):
                rows = [self._row(index, requests[index]) for index in indices[start : start + window]]
                for batch in batches_of(rows, self.batch_size):
                    inputs = padded(self.processor, [row.prompt for row in batch], [row.images for row in batch])
                    answers = generate(self.model, self.tokenizer, inputs, generation, self.stops)
                    for row, (answer, count) in zip(batch, answers, strict=True):
                        results[row.doc_id] = GenerationResult(answer.strip(), TokenCounts(output_tokens=count))
                    bar.update(len(batch))
        bar.close()
        return [results[index] for index in range(len(requests))]

    def _generation(self, request: Any) -> Generation:
        given = {key: value for key, value in (request.args[2] or {}).items() if key not in NOT_OURS}
        until = given.get("until") or []
        # lmms-eval itself fills in a blank line where a task says nothing; its own back ends leave it out too
        given["until"] = [stop for stop in ([until] if isinstance(until, str) else until) if stop.strip()]
        options = generation_options(given, f"task {request.task_name}: generation_kwargs")
        return Generation(**{"max_new_tokens": LONGEST, **options})

    def _row(self, index: int, request: Any) -> Row:
        _, doc_to_messages, _, doc_id, task, split = request.args
        context = RowContext(f"{task}:{doc_id}", Path("/"), need_answer=False)  # pictures' paths are the task's own
        conversation = messages({"messages": doc_to_messages(self.task_dict[task][split][doc_id])}, context)
        return Row(index, {}, [], None, rendered(self.processor, conversation), conversation.images)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: the answers are generated."""
        raise InputError(
            "vlm_taid generates answers: tasks of the output type loglikelihood or multiple_choice do not run"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: one question has one answer."""
        raise InputError(
            "vlm_taid answers in one round: tasks of the output type generate_until_multi_round do not run"
        )
