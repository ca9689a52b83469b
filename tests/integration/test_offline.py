"""Offline use with real processes and the demo model: `LLM` and `baton batch` against a server, and their shutdown."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton import LLM, SamplingParams
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings
from baton.node.errors import SettingsError
from baton.tests.integration.cluster import start_node
from baton.tests.integration.prompts import PROMPTS

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key of the test"
SETTINGS: dict[str, Any] = {"device": "cpu", "store_ram_gib": 0}
SMALL: dict[str, Any] = {**SETTINGS, "prefill": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """An already running server."""
    with Cluster(ServeSettings(device="cpu", api_key=(KEY,)), start=start_node) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **SETTINGS) as llm:
        yield llm


def ask(cluster: Cluster, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"model": "demo", "return_token_ids": True, **body}
    answer = httpx.post(f"{cluster.url}{path}", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_greedy_answers_are_the_servers(llm: LLM, cluster: Cluster) -> None:
    """Guards texts, ids and finish reasons, in the order of the prompts, whose answers differ in length."""
    prompts = PROMPTS[:6]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        choice = ask(cluster, prompt=prompt, temperature=0, max_tokens=24)["choices"][0]
        answer = output.outputs[0]
        assert (answer.text, answer.finish_reason) == (choice["text"], choice["finish_reason"])
        assert answer.token_ids == choice["token_ids"] and output.prompt_token_ids == choice["prompt_token_ids"]


def test_seeded_answers_are_the_servers(llm: LLM, cluster: Cluster) -> None:
    """Guards seeds: the k-th of n choices has seed + k, alone and in a batch; log probabilities are equal."""
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, n=2, max_tokens=12, logprobs=2)
    output = llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)[1]
    fields = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "n": 2, "max_tokens": 12, "logprobs": 2}
    choices = ask(cluster, prompt=PROMPTS[0], **fields)["choices"]
    for answer, choice in zip(output.outputs, choices, strict=True):
        assert (answer.text, answer.token_ids) == (choice["text"], choice["token_ids"])
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
        drawn = [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert drawn == choice["logprobs"]["token_logprobs"] and answer.cumulative_logprob == sum(drawn)
        shown = [place[token].decoded_token for place, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert shown == choice["logprobs"]["tokens"]
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_a_chat_and_a_running_server(llm: LLM, cluster: Cluster) -> None:
    """Guards `chat`: both forms of `LLM` and a plain request give the same answer."""
    messages = [{"role": "user", "content": "Tell me a story about a cat."}]
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(base_url=cluster.url, api_key=KEY) as remote:
        outputs = [each.chat(messages, params, use_tqdm=False)[0] for each in (llm, remote)]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 12}
    answer = ask(cluster, "/v1/chat/completions", **fields)
    for output in outputs:
        assert output.outputs[0].text == answer["choices"][0]["message"]["content"]
        assert output.outputs[0].token_ids == answer["choices"][0]["token_ids"]
        assert output.prompt_token_ids == answer["prompt_token_ids"]
    assert outputs[0].prompt_token_ids == llm.get_tokenizer().apply_chat_template(messages)


def test_invalid_prompts_in_a_batch(llm: LLM) -> None:
    """Guards the other prompts of a batch; each invalid one has its own error."""
    bad = ["", {"prompt_token_ids": [10**6]}, {"prompt_token_ids": [1] * 3000}]
    outputs = llm.generate([PROMPTS[0], *bad, PROMPTS[1]], SamplingParams(temperature=0), use_tqdm=False)
    errors = [output.error or "" for output in outputs]
    assert errors[0] == errors[4] == "" and outputs[0].outputs[0].text and outputs[4].outputs[0].text
    assert "empty" in errors[1] and "outside the vocabulary" in errors[2] and "maximum context length" in errors[3]


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    """Guards vLLM's max_tokens=None against the completions API's default of 16."""
    prompt = {"prompt_token_ids": [1] * (llm.max_model_len - 20)}
    output = llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 20


def test_two_instances_at_once_and_in_sequence(llm: LLM) -> None:
    """Guards against shared ports or folders; closing one must not end the other."""
    params = SamplingParams(temperature=0)
    with LLM("demo", **SMALL) as second:
        answers = [each.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].text for each in (llm, second)]
    assert answers[0] == answers[1] == llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].text


def test_a_server_that_cannot_start_gives_the_reason() -> None:
    with pytest.raises(SettingsError, match="device"):
        LLM("demo", device="abacus")


# ---- shutdown -------------------------------------------------------------------------------------------------------


def processes_with(mark: str) -> set[int]:
    """Processes that have inherited `mark` in their environment."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            pass  # it has ended, or belongs to another user
    return found


def wait_until_gone(mark: str) -> None:
    for _ in range(600):
        if not processes_with(mark):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {processes_with(mark)}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("end", ["killed", "left open"])
def test_no_process_is_left(end: str, tmp_path: Path) -> None:
    """Guards against processes that outlive a killed parent, or one that does not call `close`."""
    mark = f"BATON_TEST_MARK_{uuid.uuid4().hex}"
    code = f"""
import sys
from baton import LLM
llm = LLM("demo", **{SMALL})
print("up", flush=True)
{"sys.stdin.read()" if end == "killed" else ""}
"""
    env = {**os.environ, mark: "1", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        if end == "killed":
            assert len(processes_with(mark)) >= 4  # itself, its server, a proxy and a worker
            parent.kill()
        assert parent.wait(60) == (-signal.SIGKILL if end == "killed" else 0)
    wait_until_gone(mark)
    assert list(tmp_path.glob("baton-llm-*")) == []


# ---- files ----------------------------------------------------------------------------------------------------------


def batch_command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "baton.offline.batch_command", *arguments]


def test_a_killed_batch_resumes(cluster: Cluster, tmp_path: Path) -> None:
    """Guards the output file: each id once, whenever the first run was killed."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 16}
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(60)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = batch_command(*("-i", str(source), "-o", str(target), "--base-url", cluster.url, "--max-in-flight", "2"))
    env = {**os.environ, "BATON_API_KEY": KEY}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as first:
        while not target.exists() or target.read_bytes().count(b"\n") < 10:
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    done = target.read_bytes().count(b"\n")
    assert 10 <= done < 60
    second = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert f"baton batch: {60 - done} answered, 0 failed, {done} skipped" in second.stdout
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{n}" for n in range(60))
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers}) == 1


# ---- the documentation page -----------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "offline.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_program_on_the_page_runs(tmp_path: Path) -> None:
    """Guards the first example of the documentation."""
    (code,) = blocks("python")
    few = 'device="cpu", store_ram_gib=0, prefill=0'  # processes
    code, count = re.subn('device="cpu"', few, code)
    assert count == 1
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4 and "error" not in done.stdout


def test_the_batch_on_the_page_runs(tmp_path: Path) -> None:
    lines, shape = blocks("json")
    (tmp_path / "in.jsonl").write_text(lines)
    (line,) = blocks("bash")
    program, *arguments = shlex.split(line)
    assert program == "baton"
    few = ("--serve-arg=--store-ram-gib=0", "--serve-arg=--prefill=0")  # processes
    command = [sys.executable, "-P", "-m", "baton", *arguments, *few]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "baton batch: 2 answered, 0 failed, 0 skipped\n"
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(line["custom_id"] for line in written) == ["a", "b"]
    for line in written:
        assert line.keys() == json.loads(shape).keys()
        assert line["response"].keys() == json.loads(shape)["response"].keys()
