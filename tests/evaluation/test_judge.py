"""The judge, against a server that the test starts on loopback."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import benchmark_rows
from tests.evaluation.test_benchmarks import right_lines
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.evaluation import judge as judging
from vlm_taid.evaluation.judge import Judge, judged
from vlm_taid.evaluation.results import json_line
from vlm_taid.evaluation.scoring import summary


class Server:
    """An OpenAI-compatible server; ``reply`` gives (status, text) for a prompt."""

    def __init__(self, reply: Callable[[str], tuple[int, str]]):
        self.requests: list[dict] = []
        self.headers: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                outer.headers.append(self.headers["Authorization"])
                status, text = reply(body["messages"][0]["content"])
                answer = {"choices": [{"message": {"role": "assistant", "content": text}}]} if status == 200 else text
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve():
    started = []

    def start(reply):
        started.append(Server(reply))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def mmvet(tmp_path):
    """A task that a judge grades, its file, and two lines with different answers."""
    path, _ = benchmark_rows.write("mmvet", tmp_path)
    return path, right_lines("mmvet", path, ["a red square", "a blue one"])[1]


def test_grades_are_kept(serve, mmvet, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server = serve(lambda prompt: (200, " 1.0\n" if "red square" in prompt.split("Answer:")[1] else "0.25"))
    _, lines = mmvet
    before = json_line(lines)
    judge = Judge(server.url, "grader", tmp_path / "out" / "judge.jsonl")
    graded = judged(lines, "judge", judge)
    assert [line["grade"] for line in graded] == [1.0, 0.25]
    assert summary(graded, "judge")["grade,none"] == 0.625 and summary(graded, "judge")["n_unjudged"] == 0
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["temperature"] == 0 and request["model"] == "grader"
    assert "red<AND>square" in request["messages"][0]["content"] and server.headers[0] == "Bearer key"
    assert json_line(lines) == before
    assert judged(lines, "judge", Judge(server.url, "grader", tmp_path / "out" / "judge.jsonl")) == graded
    assert len(server.requests) == 2  # the second time all replies were known
    judged(lines, "judge", Judge(f"{server.url}/chat/completions", "other", tmp_path / "out" / "judge.jsonl"))
    assert len(server.requests) == 4  # another judge is another opinion


def test_attempts(serve, mmvet):
    tries = []

    def reply(prompt):
        tries.append(prompt)
        return (503, "busy") if len(tries) < 3 else (200, "1")

    server = serve(reply)
    assert judged(mmvet[1][:1], "judge", Judge(server.url, "grader", wait=0.01))[0]["grade"] == 1.0
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("status", "text", "message", "requests"),
    [
        (401, "bad key", "HTTP 401.*bad key", 1),
        (500, "broken", "HTTP 500", judging.ATTEMPTS),
        (200, "It is right.", "row 1: the judge said 'It is right.', not a number", 1),
        (200, "1.5", "not a number between 0 and 1", 1),
    ],
)
def test_a_judge_that_fails_stops_or_is_recorded(serve, mmvet, status, text, message, requests):
    server = serve(lambda prompt: (status, text))
    judge = Judge(server.url, "grader", wait=0.001)
    with pytest.raises(InputError, match=message):
        judged(mmvet[1][:1], "judge", judge)
    assert len(server.requests) == requests
    recorded = judged(mmvet[1], "judge", judge, "record")
    found = summary(recorded, "judge")
    assert found["n_errors"] == 2 and found["sample_len"] == 0 and found["grade,none"] is None


def test_a_dead_judge_is_a_clear_sentence(mmvet):
    with pytest.raises(InputError, match=r"the judge x at http://127.0.0.1:9/v1/chat/completions does not answer"):
        judged(mmvet[1], "judge", Judge("http://127.0.0.1:9/v1", "x", wait=0.001))
    with pytest.raises(InputError, match="http or https"):
        Judge("file:///etc/passwd", "x")


def test_mathvista_extracts_what_rules_cannot_read(serve, tmp_path):
    path, _ = benchmark_rows.write("mathvista", tmp_path)
    _, lines = right_lines("mathvista", path, ["the second of both, I think", "fourteen of them"])
    assert summary(lines, "mathvista")["n_unjudged"] == 2
    server = serve(lambda prompt: (200, "(B)" if "(B) 8/11" in prompt else "14.0"))
    found = judged(lines, "mathvista", Judge(server.url, "reader"))
    assert [line["accuracy"] for line in found] == [1.0, 1.0]
    nothing = serve(lambda prompt: (200, "NONE"))
    assert summary(judged(lines, "mathvista", Judge(nothing.url, "reader")), "mathvista")["accuracy,none"] == 0
    _, lines = right_lines("mathvista", path, ["(A) 3/11", "14"])  # rules alone: no request
    assert [line["accuracy"] for line in judged(lines, "mathvista", Judge("http://127.0.0.1:9", "x"))] == [0.0, 1.0]


def test_without_a_judge_there_is_no_score(serve, mmvet, vlm, tmp_path, capfd):
    """And the judge of a later `eval score` gives it."""
    vlm[0].save_pretrained(tmp_path / "tiny")
    vlm[1].save_pretrained(tmp_path / "tiny")
    command = ["eval", "run", "--model", str(tmp_path / "tiny"), "--tasks", "mmvet", "--data", f"mmvet={mmvet[0]}"]
    command += ["--num_workers", "0", "--max_new_tokens", "3", "--output_path", str(tmp_path / "out")]
    assert main(command) == 0
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["mmvet"]
    assert results["grade,none"] is None and results["n_unjudged"] == 2
    assert "2 rows wait for a judge" in next((tmp_path / "out").rglob("summary.md")).read_text()
    server = serve(lambda prompt: (200, "0.5"))
    judge = ["--judge_url", server.url, "--judge_model", "grader"]
    samples = next((tmp_path / "out").rglob("samples_mmvet_*.jsonl"))
    assert main(["eval", "score", "--predictions", str(samples), *judge]) == 0
    assert "judge@judge: 50.0" in capfd.readouterr().out
    assert main([*command, *judge]) == 0
    assert main([*command, *judge]) == 0
    later = sorted((tmp_path / "out").rglob("results_*.json"))[-1]
    assert json.loads(later.read_text())["results"]["mmvet"]["grade,none"] == 0.5
    assert json.loads(later.read_text())["config"]["judge"] == "grader"
    assert main([*command, "--judge_url", server.url]) == 2 and "--judge_model" in capfd.readouterr().err
