"""`baton batch` against a scripted server: each line once, whatever is wrong with it; interrupted runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.offline import client
from baton.offline.batch import LINES_PER_SYNC, BatchLine, BatchOutput
from baton.offline.batch_command import main
from baton.tests.unit.offline.fake_server import FakeServer, Hangup, Reply, completion, failure, fake_server


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(client, "FIRST_RETRY_S", 0.0)
    with fake_server() as server:
        yield server


def request(custom_id: str, prompt: str = "a", **fields: Any) -> str:
    body = {"model": "fake", "prompt": prompt, **fields.pop("body", {})}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **fields})


class Batch:
    """An input, an output, and runs of the command."""

    def __init__(self, folder: Path, url: str) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self._url = url

    def write(self, *lines: str) -> None:
        self.input.write_text("".join(line + "\n" for line in lines))

    def run(self, *options: str) -> int:
        files = ["-i", str(self.input), "-o", str(self.output)]
        return main([*files, "--base-url", self._url, "--max-in-flight", "3", *options])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def ids(self) -> list[str]:
        return sorted(line["custom_id"] for line in self.lines())


@pytest.fixture
def batch(tmp_path: Path, fake: FakeServer) -> Batch:
    return Batch(tmp_path, fake.url)


def test_requests_of_several_apis(batch: Batch, fake: FakeServer) -> None:
    """Guards the paths of OpenAI's batches that this server has."""
    fake.answers["/v1/responses"] = lambda body: (200, {"id": "resp_1", "of": body["input"]})
    batch.write(request("a", url="/v1/responses", body={"input": "x"}), request("b", url="/v1/embeddings"))
    assert batch.run() == 1
    found = {line["custom_id"]: line for line in batch.lines()}
    assert found["a"]["response"]["body"] == {"id": "resp_1", "of": "x"}
    assert found["b"]["response"] is None and "/v1/responses" in found["b"]["error"]["message"]


def test_lines_of_the_output(batch: Batch, fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's format: programs that read its files read ours."""
    fake.answers["/v1/completions"] = lambda body: (200, {"id": "cmpl-1", "choices": [], "of": body["prompt"]})
    batch.write(request("first"))
    assert batch.run() == 0
    (line,) = batch.lines()
    assert line.pop("id").startswith("batch_req_")
    body = {"id": "cmpl-1", "choices": [], "of": "a"}
    assert line == {
        "custom_id": "first",
        "response": {"status_code": 200, "request_id": "cmpl-1", "body": body},
        "error": None,
    }
    assert "1 answered, 0 failed, 0 skipped" in capsys.readouterr().out


def test_a_bad_line_stops_no_other(batch: Batch, fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["/v1/completions"] = lambda body: completion(body) if body["prompt"] else failure(400, "empty")
    batch.write(
        request("good"),
        request("empty", ""),
        "",
        "not JSON",
        request("get", method="GET"),
        request("elsewhere", url="/metrics"),
        request("stream", body={"stream": True}),
        json.dumps({"custom_id": "bodyless", "method": "POST", "url": "/v1/completions"}),
        "[" * 100_000,
        request("last"),
    )
    assert batch.run() == 1
    lines = {line["custom_id"] or line["error"]["line"]: line for line in batch.lines()}
    answered = [key for key, line in lines.items() if line["response"] and line["response"]["status_code"] == 200]
    assert sorted(answered) == ["good", "last"]
    assert lines["empty"]["response"]["body"]["error"]["message"] == "empty"
    invalid = {key for key, line in lines.items() if line["response"] is None}
    assert invalid == {4, 9, "get", "elsewhere", "stream", "bodyless"}
    assert {lines[key]["error"]["code"] for key in invalid} == {"invalid_request"}
    assert "2 answered, 7 failed, 0 skipped" in capsys.readouterr().out


def test_a_second_run_asks_only_for_what_is_missing(batch: Batch, fake: FakeServer) -> None:
    """Bad lines too: without an id they would be written again in each run."""
    batch.write(request("a"), "not JSON", request("b", "b"))
    assert batch.run() == 1
    batch.input.write_text(batch.input.read_text() + request("c", "c") + "\n")
    assert batch.run() == 0
    assert sorted(body["prompt"] for body in fake.bodies) == ["a", "b", "c"]
    assert len(batch.lines()) == 4


def test_a_finished_batch_needs_no_server(batch: Batch) -> None:
    batch.write(request("a"))
    assert batch.run() == 0
    files = ["-i", str(batch.input), "-o", str(batch.output)]
    assert main([*files, "--base-url", "http://127.0.0.1:1"]) == 0


def test_an_id_that_stands_twice_is_answered_once(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    """The output could not tell the two apart."""
    batch.write(request("a"), request("a", "b"))
    assert batch.run() == 0
    assert batch.ids() == ["a"] and "1 answered, 0 failed, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, 9, 30, -1])
def test_a_torn_line_is_asked_again(batch: Batch, cut: int) -> None:
    """A killed run leaves a part of a line; with the next line behind it, both would be lost."""
    batch.write(request("a"), request("b"))
    assert batch.run() == 0
    first, second = batch.output.read_bytes().splitlines(keepends=True)
    batch.output.write_bytes(first + second[:cut])
    assert batch.run() == 0
    assert batch.ids() == ["a", "b"]


@pytest.mark.parametrize("content", ["a diary\n", "a diary", '{"id": 5}\n', '{"id":"batch_req_1"}\nmore'])
def test_a_file_that_is_no_output_is_left_alone(batch: Batch, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch.write(request("a"))
    batch.output.write_text(content)
    assert batch.run() == 2
    assert batch.output.read_text() == content and "no output of a batch" in capsys.readouterr().err


def test_two_runs_do_not_write_one_file(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each would write every line."""
    batch.write(request("a"))
    with BatchOutput(batch.output):
        assert batch.run() == 2
    assert "written by another run" in capsys.readouterr().err and batch.lines() == []


def test_a_server_that_dies_leaves_its_lines_to_a_later_run(batch: Batch, fake: FakeServer) -> None:
    """As failed lines they would be in the output, and skipped from then on."""
    dead = threading.Event()

    def dies(body: dict[str, Any]) -> Reply:
        if dead.is_set() or body["prompt"] == "b":
            dead.set()
            raise Hangup
        return completion(body)

    def get(path: str) -> Reply:
        if dead.is_set():
            raise Hangup
        return alive(path)

    alive, fake.get = fake.get, get  # type: ignore[method-assign]
    fake.answers["/v1/completions"] = dies
    batch.write(request("a"), *(request(f"b{number}", "b") for number in range(9)))
    assert batch.run("--max-in-flight=1") == 1
    assert batch.ids() == ["a"]
    dead.clear()
    fake.answers["/v1/completions"] = completion
    assert batch.run() == 0
    assert len(batch.ids()) == len(set(batch.ids())) == 10


def test_a_request_without_an_answer_is_an_error_while_the_server_lives(batch: Batch, fake: FakeServer) -> None:
    """One that ends the server's connection each time must not keep the others from being answered."""

    def hangs_up(body: dict[str, Any]) -> Reply:
        if body["prompt"] == "b":
            raise Hangup
        return completion(body)

    fake.answers["/v1/completions"] = hangs_up
    batch.write(request("a"), request("b", "b"), request("c"))
    assert batch.run() == 1
    assert batch.ids() == ["a", "b", "c"]
    assert [line["error"]["code"] for line in batch.lines() if line["error"]] == ["no_answer"]


def test_a_pretty_body_stays_on_one_line(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other servers indent their JSON; a line break inside would end the line."""
    plain = json.dumps
    batch.write(request("a"))
    monkeypatch.setattr(json, "dumps", lambda value: plain(value, indent=2))
    assert batch.run() == 0
    assert batch.ids() == ["a"]


def test_lines_reach_the_disk_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never, and a power cut loses a day; each, and a fast server waits for the disk."""
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append(len(path.read_bytes().splitlines())))
    path = tmp_path / "out.jsonl"
    with BatchOutput(path) as output:
        for number in range(2 * LINES_PER_SYNC + 1):
            output.append(BatchLine("batch_req_1", str(number)))
    assert synced == [LINES_PER_SYNC, 2 * LINES_PER_SYNC, 2 * LINES_PER_SYNC + 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "IN"], "the same file"),
        (["--input", "no-such-file"], "cannot read no-such-file"),
        (["--output", "no-such-folder/x"], "cannot write"),
        (["--serve-arg=--decode=2"], "--serve-arg is for a server that is started"),
        (["--base-url", "nonsense"], "no URL"),
    ],
)
def test_wrong_commands_are_one_line(
    batch: Batch, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.write(request("a"))
    assert batch.run(*(str(batch.input) if option == "IN" else option for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("baton batch: error: ") and said in error and error.count("\n") == 1
    assert not batch.output.exists() or batch.output.read_bytes() == b""
