"""From conversations to answers: prompts by the chat template, batches padded on the left, greedy search or beams.

Legend of shapes: B rows, A new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.templates import left_out_begin
from vlm_taid.errors import BadRow, InputError

# lm-eval's names; those of sampling may be given where they ask for none
_KINDS = {"max_new_tokens": int, "num_beams": int, "repetition_penalty": float}
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Generation:
    """How answers are generated. Nothing is drawn at random: an answer depends on its question alone.

    Args:
        max_new_tokens: the longest answer, in tokens.
        num_beams: beams; 1 is greedy search.
        repetition_penalty: divides the logits of tokens that were there already; 1 is none.
        until: an answer ends before the first of these texts, which is cut after the fact.

    Raises:
        InputError: a number is out of its range.
    """

    max_new_tokens: int = 16
    num_beams: int = 1
    repetition_penalty: float = 1.0
    until: Sequence[str] = ()

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}, more than 0 is needed")

    def config(self, tokenizer: Any, stops: Sequence[int]) -> GenerationConfig:
        """transformers' form of it, whatever the model's own says: what is None here would be filled in from there."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=0,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            eos_token_id=list(stops),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        )


def generation_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `Generation`, from a command line's words or a task file's values.

    Args:
        values: ``max_new_tokens`` (or lm-eval's ``max_gen_toks``), ``num_beams``, ``repetition_penalty``, ``until``;
            and ``do_sample``, ``temperature``, ``top_p``, ``top_k``, of which nothing is left: they must not ask for
            sampling.
        where: begins the messages.

    Raises:
        InputError: an unknown key, a value of the wrong kind, or sampling.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if "max_gen_toks" in given:
        if "max_new_tokens" in given:
            raise InputError(f"{where}: max_new_tokens and max_gen_toks are the same: give one of them")
        given["max_new_tokens"] = given.pop("max_gen_toks")
    if unknown := sorted(set(given) - {*_KINDS, *_SAMPLING, "until"}):
        known = ", ".join([*_KINDS, "until", *_SAMPLING])
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {known}")
    found: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        if key in given:
            found[key] = _number(given[key], kind, f"{where}: {key}")
    if until := given.get("until"):
        found["until"] = [until] if isinstance(until, str) else list(map(str, until))
    draws = str(given.get("do_sample", True)).lower() not in ("false", "0")
    temperature = given.get("temperature", 1 if "do_sample" in given else 0)
    if draws and _number(temperature, float, f"{where}: temperature") > 0:
        raise InputError(f"{where}: this asks for sampling, but answers are greedy here: give do_sample=false")
    return found


def _number(value: Any, kind: type, name: str) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}, expected {'a whole' if kind is int else 'a'} number") from None


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the generation config's, and the tokenizer's end of text.

    Raises:
        InputError: there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    stops = sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None})
    if not stops:
        name = model.name_or_path or type(model).__name__
        raise InputError(f"model {name}: neither its generation config nor its tokenizer names an end of turn")
    return stops


def rendered(processor: Any, conversation: Conversation) -> str:
    """The conversation by the chat template, up to where the answer begins, with all special tokens.

    Raises:
        BadRow: the row has a picture and ``processor`` is a tokenizer, or its template refuses the row.
    """
    multimodal = hasattr(processor, "tokenizer")
    if conversation.images and not multimodal:
        raise BadRow(conversation.row, "has a picture, but the model reads text only")
    messages = conversation.messages(structured=multimodal)
    try:
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a row, and says so by any of jinja's errors
        raise BadRow(conversation.row, f"the chat template cannot phrase it: {error}") from error
    begin = left_out_begin(processor)
    return prompt if prompt.startswith(begin) else begin + prompt


def padded(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """The model's inputs for B rows, padded on the left: so an answer depends on no other row of the batch.

    Args:
        processor: of the model.
        prompts: from `rendered`.
        images: each row's pictures; all rows have some, or none has.
    """
    process = partial(processor, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return process(text=list(prompts), images=list(images)) if images and images[0] else process(text=list(prompts))


def generate(
    model: PreTrainedModel, tokenizer: Any, inputs: Any, generation: Generation, stops: Sequence[int]
) -> list[tuple[str, int]]:
    """The rows' answers and how many tokens each took, the end of turn included.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        inputs: from `padded`.
        generation: how.
        stops: from `stop_tokens`.
    """
    inputs = inputs.to(model.device)
    for name, tensor in inputs.items():
        if torch.is_floating_point(tensor):
            inputs[name] = tensor.to(model.dtype)
    config: Any = generation.config(tokenizer, stops)
    ids_BA = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]  # pyright: ignore
    answers = []
    for ids_A in ids_BA.tolist():
        end = next((position for position, token in enumerate(ids_A) if token in stops), len(ids_A))
        text = tokenizer.decode(ids_A[:end], skip_special_tokens=True)
        for stop in generation.until:
            text = text.split(stop)[0]
        answers.append((text, min(end + 1, len(ids_A))))
    return answers
