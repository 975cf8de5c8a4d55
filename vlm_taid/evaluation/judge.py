"""A judge: a language model behind any OpenAI-compatible URL grades answers, or says what they finally answer.

Temperature 0, and every reply is kept on disk, so that the same answer is judged once. Nothing is guessed: a judge that
does not answer, or answers something else than it was asked for, is an error.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import options_of
from vlm_taid.evaluation.metrics import score
from vlm_taid.evaluation.readers import json_line, text_sha256
from vlm_taid.evaluation.scoring import mathvista_problem, scoring

GRADE = """An answer to a question about a picture is to be graded. You do not see the picture; go by the reference.
In the reference, <AND> joins parts that are all needed, <OR> parts of which one is enough.

Question: {question}
Reference: {reference}
Answer: {answer}

How right is the answer? Reply with one number between 0.0 (wrong) and 1.0 (fully right) and nothing else."""
EXTRACT = """Here is a question and what a model said to it. State what it finally answers, without judging it.

Question: {question}
{form}
Model: {answer}

Reply with that final answer alone, or with NONE if there is none."""
NUMBER = re.compile(r"[01]|0?\.\d+|[01]\.\d*")
TIMEOUT = 120.0  # seconds for one reply
ATTEMPTS = 4
AT_ONCE = 8  # requests


class Judge:
    """Asks a model behind a URL.

    Args:
        url: of the server, such as ``http://localhost:8000/v1``; ``/chat/completions`` is added if it is not there. A
            key is taken from the environment's ``OPENAI_API_KEY`` and sent to this URL alone.
        model: the model's name there.
        cache: a file of replies; None: nothing is kept.
        wait: seconds before the second attempt; twice as long before each other one.
    """

    def __init__(self, url: str, model: str, cache: Path | None = None, wait: float = 2.0):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--judge_url {url}: expected an http or https URL, such as http://localhost:8000/v1")
        self.url = url if url.rstrip("/").endswith("/chat/completions") else f"{url.rstrip('/')}/chat/completions"
        self.model, self.cache, self.wait = model, cache, wait
        self._known: dict[str, str] = {}
        if cache is not None and cache.is_file():
            for line in cache.read_text(encoding="utf-8").split("\n")[:-1]:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["reply"]

    def ask(self, prompts: Sequence[str]) -> list[str | InputError]:
        """The replies, or why there is none; each different prompt is asked once, several at a time."""
        keys = {prompt: text_sha256(json_line([self.model, prompt])) for prompt in prompts}
        new = [prompt for prompt, key in keys.items() if key not in self._known]
        failed: dict[str, InputError] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for prompt, reply in zip(new, pool.map(self._reply, new), strict=True):
                if isinstance(reply, InputError):
                    failed[prompt] = reply
                else:
                    self._keep(keys[prompt], reply)
        return [failed.get(prompt) or self._known[keys[prompt]] for prompt in prompts]

    def _keep(self, key: str, reply: str) -> None:
        self._known[key] = reply
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json_line({"key": key, "model": self.model, "reply": reply}) + "\n")

    def _reply(self, prompt: str) -> str | InputError:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.read(300).decode(errors='replace').strip()}".strip()
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # another attempt would be told the same
            except (OSError, ValueError, LookupError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
        return InputError(f"the judge {self.model} at {self.url} does not answer: {reason}")


def judged(
    lines: Sequence[dict[str, Any]], metric: str, judge: Judge, on_error: Literal["stop", "record"] = "stop"
) -> list[dict[str, Any]]:
    """The lines, with a score where a judge had to say it, and its reply under ``judge``.

    Raises:
        InputError: the judge does not answer, or not what it was asked for, and ``on_error`` is stop; with record the
            line gets an ``error`` in place of a score.
    """
    found = scoring(metric)
    open_lines = [index for index, line in enumerate(lines) if "error" not in line and line[found.key] is None]
    if found.judge is None or not open_lines:
        return list(lines)
    replies = judge.ask([_prompt(lines[index], found.judge) for index in open_lines])
    result = list(lines)
    for index, reply in zip(open_lines, replies, strict=True):
        line = lines[index]
        value = reply if isinstance(reply, InputError) else _value(line, found.judge, reply)
        if not isinstance(value, InputError):
            result[index] = line | {found.key: value, "judge": reply}
        elif on_error == "stop":
            raise value
        else:
            result[index] = line | {"error": str(value)}
    return result


def _prompt(line: Mapping[str, Any], task: Literal["grade", "extract"]) -> str:
    doc, answer = line["doc"], line["filtered_resps"][0]
    if task == "grade":
        return GRADE.format(question=doc.get("question"), reference=" <OR> ".join(line["target"]), answer=answer)
    options = options_of(doc)
    if options:
        form = "Options:\n" + "\n".join(f"({letter}) {text}" for letter, text in options.items())
    else:
        form = {"integer": "A whole number is asked for.", "float": "A number is asked for."}.get(
            doc["answer_type"], ""
        )
    return EXTRACT.format(question=doc.get("question"), form=form, answer=answer)


def _value(line: Mapping[str, Any], task: Literal["grade", "extract"], reply: str) -> float | InputError:
    reply = reply.strip()
    if task == "grade":
        value = float(reply) if NUMBER.fullmatch(reply) else 2.0
        if value <= 1:
            return value
        return InputError(f"row {line['doc_id'] + 1}: the judge said {reply[:80]!r}, not a number between 0 and 1")
    if reply.upper() == "NONE":
        return 0.0
    problem = mathvista_problem(line["doc"], line["target"])
    return float(score("mathvista_normalize", reply, [problem]) == problem["answer"])
