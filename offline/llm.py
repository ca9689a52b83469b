"""`LLM`: a model for a Python program, with the names of vLLM's offline API.

It starts a private server, or uses a running one, and sends each prompt as one HTTP request, so many at a time that the
workers are busy. It owns the order of the outputs and their errors; knows no workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
from tqdm.auto import tqdm

from baton.node.errors import SettingsError
from baton.node.modelhub import locate_model
from baton.offline.client import NoAnswer, run_bounded
from baton.offline.connection import REQUEST_TIMEOUT_S, ServerConnection
from baton.offline.outputs import RequestOutput, failed_output, failure_message, request_output
from baton.offline.prompts import OfflinePrompt, one_each, read_conversations, read_prompts
from baton.offline.sampling import SamplingParams, sampling_fields
from baton.offline.tokenizer import OfflineTokenizer

ProgressBar = Callable[..., Any]


class _TokenizeAnswer(msgspec.Struct):
    tokens: list[int]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class OfflineMetric:
    """One sample of the server's metrics."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt on its way: what is sent, and what its output repeats of it."""

    path: str
    body: dict[str, object]
    prompt: OfflinePrompt
    params: SamplingParams | None

    @property
    def n(self) -> int:
        return self.params.n if self.params else 1


class LLM:
    """A model that generates text.

        from baton import LLM, SamplingParams

        with LLM("demo") as llm:
            for output in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32)):
                print(output.outputs[0].text)

    `model` and `settings` are those of `baton serve`: prefill=2, decode=2, worker_arg=["--dtype=bfloat16"].
    The processes start here and end with `close`, at the end of a `with`, with the object, and with this process,
    however that ends. With `base_url` the requests go to a running server instead, and nothing is started.

    Raises SettingsError where the server cannot start or cannot be reached, TypeError for an unknown setting.
    """

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str = "",
        api_key: str = "",
        tokenizer: str = "",
        max_in_flight: int | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        **settings: Any,
    ) -> None:
        """`tokenizer` is a model folder or hub id for `get_tokenizer`, by default `model`; beside `base_url`, `model`
        is the name of one of that server's models, by default its first.
        """
        self._tokenizer_name = tokenizer or ("" if base_url else model)
        self._tokenizer: OfflineTokenizer | None = None
        self._chat_template = Path(settings["chat_template"]) if settings.get("chat_template") else None
        self._ids = itertools.count()
        self._server = ServerConnection(
            model,
            base_url=base_url,
            api_key=api_key,
            max_in_flight=max_in_flight,
            request_timeout_s=request_timeout_s,
            settings=settings,
        )

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return self._server.model

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._server.max_model_len

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started. A second call does nothing."""
        self._server.close()

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[RequestOutput]:
        """One output for each prompt, in their order.

        A prompt is a str, {"prompt": str} or {"prompt_token_ids": [int]}; a dict may have a "cache_salt", and prompts
        of different salts share no KV. `sampling_params` are for all prompts, or
        one for each; None: the defaults that the model recommends. A prompt that cannot be answered has an output with
        `error`; the others are answered.
        """
        read = read_prompts(prompts)
        params = one_each(sampling_params, len(read))
        jobs = [self._completion_job(prompt, each) for prompt, each in zip(read, params, strict=True)]
        return self._run_jobs(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | ProgressBar = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The next message of one conversation, or of each of a list of conversations.

        A conversation is a list of {"role": "system" | "user" | "assistant" | "tool", "content": str}.
        `continue_final_message` continues its last message, and needs `add_generation_prompt` to be False;
        `chat_template_kwargs` are variables of the chat template. The rest is as in `generate`.
        """
        conversations = read_conversations(messages)
        params = one_each(sampling_params, len(conversations))
        template = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}),
        }
        jobs = [
            self._chat_job({"messages": chat, **template}, each)
            for chat, each in zip(conversations, params, strict=True)
        ]
        return self._run_jobs(jobs, use_tqdm)

    def get_tokenizer(self) -> OfflineTokenizer:
        """The model's tokenizer, read once. Raises SettingsError where its folder is not known."""
        if self._tokenizer is None:
            if not self._tokenizer_name:
                raise SettingsError("LLM(base_url=...) needs tokenizer=: the model's folder or hub id")
            self._tokenizer = OfflineTokenizer(locate_model(self._tokenizer_name), self._chat_template)
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model recommends, for dataclasses.replace. Needs the tokenizer's folder."""
        defaults = self.get_tokenizer().defaults
        return SamplingParams(
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
        )

    def get_metrics(self) -> list[OfflineMetric]:
        """The server's metrics as they are now; docs/metrics.md lists them."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self._server.get("/metrics").decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return [OfflineMetric(sample.name, sample.labels, sample.value) for sample in samples]

    # -- inside

    def _completion_job(self, prompt: OfflinePrompt, params: SamplingParams | None) -> _Job:
        body: dict[str, object] = {"prompt": list(prompt.token_ids) if prompt.text is None else prompt.text}
        if prompt.cache_salt:
            body["cache_salt"] = prompt.cache_salt
        return self._job("/v1/completions", body, prompt, params)

    def _chat_job(self, body: dict[str, object], params: SamplingParams | None) -> _Job:
        return self._job("/v1/chat/completions", body, OfflinePrompt(None), params)

    def _job(self, path: str, body: dict[str, object], prompt: OfflinePrompt, params: SamplingParams | None) -> _Job:
        fields = sampling_fields(params, chat="messages" in body)
        return _Job(path, {"model": self.model, **body, **fields, "return_token_ids": True}, prompt, params)

    def _run_jobs(self, jobs: list[_Job], use_tqdm: bool | ProgressBar) -> list[RequestOutput]:
        """All outputs. Ctrl-C cancels what is in flight, and leaves the server as it was."""
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        outputs: list[RequestOutput | None] = [None] * len(jobs)
        ids = [str(next(self._ids)) for _ in jobs]
        decode = self._decoder(jobs)
        with make_bar(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:

            async def run_one(index: int) -> None:
                outputs[index] = await self._output(ids[index], jobs[index], decode)
                bar.update(1)

            limit = max(1, self._server.max_in_flight // max((job.n for job in jobs), default=1))
            self._server.run(run_bounded(range(len(jobs)), limit, run_one))
        return [output for output in outputs if output is not None]

    async def _output(self, request_id: str, job: _Job, decode: Callable[[int], str] | None) -> RequestOutput:
        """The answer to one prompt, or why there is none."""
        prompt, params = job.prompt, job.params
        try:
            body = await self._complete_body(job)
            answer = await self._server.client.post(job.path, msgspec.json.encode(body))
            if answer.status == 200:
                num_top = params.logprobs if params and params.logprobs else 0
                return request_output(request_id, prompt.text, answer.body, num_top, decode)
            error = failure_message(answer.status, answer.body)
        except (NoAnswer, ValueError, TypeError) as failure:
            error = str(failure)
        return failed_output(request_id, prompt.text, prompt.token_ids, job.n, error)

    async def _complete_body(self, job: _Job) -> dict[str, object]:
        """The body to be sent; where max_tokens is None, with what the context has room for after the prompt."""
        if job.params is None or job.params.max_tokens is not None or job.path != "/v1/completions":
            return job.body
        ids, room = list(job.prompt.token_ids), self.max_model_len
        if job.prompt.text is not None:
            question = msgspec.json.encode({"model": self.model, "prompt": job.prompt.text})
            answer = await self._server.client.post("/tokenize", question)
            if answer.status != 200:
                raise ValueError(failure_message(answer.status, answer.body))
            counted = msgspec.json.decode(answer.body, type=_TokenizeAnswer)
            ids, room = counted.tokens, counted.max_model_len
        return {**job.body, "prompt": ids, "max_tokens": max(1, room - len(ids))}

    def _decoder(self, jobs: Sequence[_Job]) -> Callable[[int], str] | None:
        """Gives the text of a token of `logprobs`; None where none are asked for, or the tokenizer is not known."""
        wanted = any(job.params is not None and job.params.logprobs is not None for job in jobs)
        return self.get_tokenizer().decode_token if wanted and self._tokenizer_name else None
