"""`LLM` against a scripted server: order, bounds, errors of single prompts, and callers with a running loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from baton.node.errors import SettingsError
from baton.offline import client
from baton.offline.llm import LLM
from baton.offline.sampling import SamplingParams
from baton.tests.unit.offline.fake_server import FakeServer, Hangup, Reply, completion, failure, fake_server


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(client, "FIRST_RETRY_S", 0.0)
    with fake_server() as server:
        yield server


@pytest.fixture
def llm(fake: FakeServer) -> Iterator[LLM]:
    with LLM(base_url=fake.url, api_key="secret", max_in_flight=4) as llm:
        yield llm


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_outputs_are_in_the_order_of_the_prompts(fake: FakeServer, llm: LLM) -> None:
    """Answers come as they are done: here the first prompt's is the last."""
    others = threading.Semaphore(0)

    def first_waits(body: dict[str, Any]) -> Reply:
        if body["prompt"] == "a":
            for _ in range(2):
                assert others.acquire(timeout=60)
        else:
            others.release()
        return completion(body)

    fake.answers["/v1/completions"] = first_waits
    outputs = llm.generate(["a", {"prompt": "b"}, {"prompt_token_ids": [4, 5]}], use_tqdm=False)
    assert texts(outputs) == ["answer to a", "answer to b", "answer to [4, 5]"]
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert [output.prompt for output in outputs] == ["a", "b", None]
    assert outputs[2].prompt_token_ids == [4, 5] and outputs[2].outputs[0].token_ids == [4, 5, 0]
    assert outputs[0].num_cached_tokens == 3


def test_no_more_in_flight_than_allowed_and_no_fewer(fake: FakeServer, llm: LLM) -> None:
    """Fewer leave workers idle; more are refused by the server, or fill its memory."""
    full = threading.Barrier(4)

    def waits_for_three_more(body: dict[str, Any]) -> Reply:
        full.wait(60)
        return completion(body)

    fake.answers["/v1/completions"] = waits_for_three_more
    prompts = [f"prompt {number}" for number in range(20)]
    assert texts(llm.generate(prompts, use_tqdm=False)) == [f"answer to {prompt}" for prompt in prompts]
    assert fake.most_at_once == 4


def test_what_is_sent(fake: FakeServer, llm: LLM) -> None:
    llm.generate(["a", "b"], [SamplingParams(seed=1), SamplingParams(seed=2, max_tokens=5)], use_tqdm=False)
    sent = {body["prompt"]: body for body in fake.bodies}
    assert (sent["a"]["seed"], sent["b"]["seed"], sent["b"]["max_tokens"]) == (1, 2, 5)
    assert sent["a"]["model"] == "fake" and sent["a"]["return_token_ids"] is True
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_a_bad_prompt_fails_alone(fake: FakeServer, llm: LLM) -> None:
    """One of a million must not lose the others."""
    fake.answers["/v1/completions"] = lambda body: completion(body) if body["prompt"] else failure(400, "empty")
    outputs = llm.generate(["a", "", "b"], SamplingParams(n=2), use_tqdm=False)
    assert [output.error for output in outputs] == [None, "HTTP 400: empty", None]
    assert [answer.finish_reason for answer in outputs[1].outputs] == ["error", "error"]
    assert texts(outputs) == ["answer to a", "", "answer to b"]


def test_overload_is_waited_out(fake: FakeServer, llm: LLM) -> None:
    """Others may use the server too. An error after as few attempts as a restart gets would lose the prompt."""
    answers = iter([failure(429, "full")] * 20)
    fake.answers["/v1/completions"] = lambda body: next(answers, completion(body))
    assert texts(llm.generate("a", use_tqdm=False)) == ["answer to a"]
    assert len(fake.bodies) == 21


def test_several_answers_a_prompt_count_as_several(fake: FakeServer, llm: LLM) -> None:
    """Each is a row of a worker: 256 prompts of 16 answers would overrun every queue."""
    llm.generate(["a"] * 8, SamplingParams(n=3), use_tqdm=False)
    assert fake.most_at_once == 1


def test_a_closed_one_says_so(fake: FakeServer) -> None:
    llm = LLM(base_url=fake.url)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a", use_tqdm=False)


def test_overload_and_lost_connections_are_retried(fake: FakeServer, llm: LLM) -> None:
    """A worker that restarts costs a wait, and no answers."""
    troubles = iter((failure(429, "full"), failure(503, "restarting"), None))

    def troubled(body: dict[str, Any]) -> Reply:
        trouble = next(troubles, completion(body))
        if trouble is None:
            raise Hangup
        return trouble

    fake.answers["/v1/completions"] = troubled
    assert texts(llm.generate("a", use_tqdm=False)) == ["answer to a"]
    assert len(fake.bodies) == 4


def test_a_server_that_is_gone_is_an_error_of_each_prompt(fake: FakeServer, llm: LLM) -> None:
    """What was answered before is kept; later prompts do not wait for all attempts each."""

    def only_the_first(body: dict[str, Any]) -> Reply:
        if body["prompt"] != "a":
            raise Hangup
        return completion(body)

    fake.answers["/v1/completions"] = only_the_first
    outputs = llm.generate(["a"] + ["b"] * 20, use_tqdm=False)
    assert outputs[0].error is None
    assert {output.error for output in outputs[1:]} == {"connection lost before an answer"}
    assert len(fake.bodies) <= 1 + 4 * client.MAX_ATTEMPTS + 16


def test_conversations(fake: FakeServer, llm: LLM) -> None:
    hello, bye = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]
    assert texts(llm.chat([hello, bye], SamplingParams(max_tokens=4), use_tqdm=False)) == [
        "answer to hello",
        "answer to bye",
    ]
    output = llm.chat(hello, use_tqdm=False)[0]
    assert output.prompt_token_ids == [1, 2] and "max_tokens" not in fake.bodies[-1]
    llm.chat(hello, use_tqdm=False, add_generation_prompt=False, chat_template_kwargs={"enable_thinking": False})
    assert fake.bodies[-1]["add_generation_prompt"] is False
    assert fake.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_as_many_tokens_as_fit(fake: FakeServer, llm: LLM) -> None:
    """The completions API takes no max_tokens for 16, so the prompt's length must be known first."""
    fake.answers["/tokenize"] = lambda body: (200, {"count": 3, "max_model_len": 100, "tokens": [1, 2, 3]})
    llm.generate("abc", SamplingParams(max_tokens=None), use_tqdm=False)
    llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=None), use_tqdm=False)
    assert [(body.get("prompt"), body.get("max_tokens")) for body in fake.bodies] == [
        ("abc", None),
        ([1, 2, 3], 97),
        ([1], 99),
    ]


async def test_a_caller_may_have_a_running_loop(llm: LLM) -> None:
    """As in a notebook, where asyncio.run raises."""
    assert texts(llm.generate("a", use_tqdm=False)) == ["answer to a"]


def test_ctrl_c_cancels_what_is_in_flight(fake: FakeServer, llm: LLM) -> None:
    """The LLM can be used afterwards, and begins none of the prompts that were left."""
    arrived, release = threading.Event(), threading.Event()

    def waits(body: dict[str, Any]) -> Reply:
        arrived.set()
        assert release.wait(60)
        return completion(body)

    fake.answers["/v1/completions"] = waits

    class Interrupting:
        """A progress bar: it is opened before the first request."""

        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Interrupting:
            threading.Thread(target=self.interrupt).start()
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def interrupt(self) -> None:
            assert arrived.wait(60)
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 50, use_tqdm=Interrupting)
    finally:
        signal.signal(signal.SIGINT, before)
        release.set()
    fake.answers["/v1/completions"] = completion
    assert texts(llm.generate("b", use_tqdm=False)) == ["answer to b"]
    assert [body["prompt"] for body in fake.bodies].count("a") <= 4


def test_progress_counts_prompts(llm: LLM) -> None:
    counted: list[int] = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            counted.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            counted.append(count)

    llm.generate(["a", "b"], use_tqdm=Bar)
    assert counted == [2, 1, 1]


def test_the_model_of_a_running_server(fake: FakeServer) -> None:
    with LLM("second", base_url=fake.url) as llm:
        assert (llm.model, llm.max_model_len) == ("second", 50)
    with pytest.raises(SettingsError, match="no model 'third' there, but fake, second"):
        LLM("third", base_url=fake.url)


def test_a_connection_that_closes_once_does_not_end_the_start(fake: FakeServer) -> None:
    """A server may close a kept connection in the moment in which it is used."""
    closes = iter((True, False))
    get = fake.get

    def closes_once(path: str) -> Reply:
        if next(closes, False):
            raise Hangup
        return get(path)

    fake.get = closes_once  # type: ignore[method-assign]
    with LLM(base_url=fake.url) as llm:
        assert llm.model == "fake"


def test_no_server_at_all_is_said_at_once() -> None:
    with pytest.raises(SettingsError, match="cannot connect"):
        LLM(base_url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "model is missing"),
        ({"model": "demo", "tensor_parallel_size": 2}, "unknown setting 'tensor_parallel_size'"),
        ({"model": "demo", "port": 8000}, "unknown setting 'port'"),
        ({"base_url": "http://127.0.0.1:1", "decode": 2}, "'decode' is a setting of a server that is started"),
        ({"model": "demo", "api_key": "x"}, "api_key belongs to base_url"),
    ],
)
def test_settings_are_checked_by_name(arguments: dict[str, Any], said: str) -> None:
    """A misspelt one must not be lost."""
    with pytest.raises(TypeError, match=said):
        LLM(**arguments)


def test_a_model_that_does_not_exist_is_said_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match="no such folder"):
        LLM("no-such-model")


def test_the_tokenizer_and_the_defaults_are_the_models(fake: FakeServer) -> None:
    with LLM(base_url=fake.url, tokenizer="demo") as llm:
        tokenizer = llm.get_tokenizer()
        ids = tokenizer.encode("Once upon a time")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Once upon a time"
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.9)
    with LLM(base_url=fake.url) as llm, pytest.raises(SettingsError, match="tokenizer="):
        llm.get_tokenizer()
