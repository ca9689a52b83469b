"""The `openai` client, unchanged, against real processes: streams, choices, logprobs, seeds, stops, usage, errors."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from baton.tests.integration.cluster import Cluster

PROMPT = "Once upon a time there was a little fox who lived in the forest with his mother. One day"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(log_folder=tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_streamed_chat_equals_a_whole_one(client: openai.OpenAI) -> None:
    """Guards the chat path end to end: template, stream, usage, and the model's own end token."""
    messages = [{"role": "user", "content": "Please tell me a long and happy story about a little dog and a red ball."}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=400)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=messages,
            temperature=0,
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(text) > 50
    assert whole.choices[0].finish_reason == "stop" and "<|" not in text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the first request cached its prefix


def test_seeds_choose_and_repeat(client: openai.OpenAI) -> None:
    """Guards reproducible sampling: same seed, same text, alone or beside others; choices differ."""

    def ask(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(
            model="demo", prompt=PROMPT, temperature=1.0, seed=seed, n=n, max_tokens=24, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    four = ask(7, n=4)
    assert len(set(four)) == 4
    assert ask(7) == four[:1]
    assert ask(8) != four[:1]


def test_logprobs_of_greedy_tokens_are_the_highest(client: openai.OpenAI) -> None:
    """Guards logprobs across the hand-over: prefill's token and decode's tokens have them, aligned."""
    answer = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob <= 0 and top[token] == max(top.values()) == logprob


def test_stop_strings_end_the_stream_and_the_work(client: openai.OpenAI, cluster: Cluster) -> None:
    """Guards stops: the text is cut before the string, and the workers stop generating."""
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0}
    text = client.completions.create(**body, max_tokens=40).choices[0].text
    stop = text[len(text) // 2 :][:6]
    cut = client.completions.create(**body, max_tokens=2000, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    cluster.wait_idle()


def test_penalties_and_bias_reach_the_workers(client: openai.OpenAI) -> None:
    """Guards passing parameters to both workers: a banned token never appears, a forced one always."""
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**body, logprobs=1).choices[0]
    forced = client.completions.create(**body, logit_bias={"300": 100}).choices[0]
    assert len(set(forced.text.split())) <= 1 and forced.text != plain.text
    repeated = client.completions.create(**body, extra_body={"repetition_penalty": 100.0}, logprobs=1).choices[0]
    assert len(set(repeated.logprobs.tokens)) == 8


def test_only_allowed_tokens_and_no_bad_words(client: openai.OpenAI) -> None:
    """Guards passing lists to both workers: the first token is prefill's, a word's beginning may be decode's."""
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    text = client.completions.create(**body).choices[0].text
    words = text.split()
    for bad in (words[0], " ".join(words[:2]), " ".join(words[4:6])):
        without = client.completions.create(**body, extra_body={"bad_words": [bad]}).choices[0].text
        assert bad in text and bad not in without
    allowed = {"allowed_token_ids": [266, 300, 301], "ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(**body | {"temperature": 1.0}, seed=4, extra_body=allowed).choices[0]
    assert set(answer.token_ids) == {266, 300, 301} and len(answer.token_ids) == 24


def test_errors_are_openais(client: openai.OpenAI) -> None:
    """Guards the client's own handling of errors."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="demo", prompt="word " * 5000)
    assert [model.id for model in client.models.list()] == ["demo"]
