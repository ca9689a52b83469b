"""Adapters with real processes: tokens of PEFT through prefill and decode workers, whatever is killed or replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.tests.integration.cluster import Cluster, Stream
from baton.tests.integration.conftest import DEMO
from baton.tests.integration.prompts import BEGINNINGS

PROMPTS = [f"{beginning} " * 3 for beginning in BEGINNINGS[:2]]
BODY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
NAMES = ("demo", "one", "two", "three")


class Adapters:
    """Random adapters of the demo model, and PEFT's greedy answers with each."""

    def __init__(self, root: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(DEMO)
        base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        self._answers = {"demo": self._of(base)}
        self.model: Any = None
        for number, name in enumerate(NAMES[1:], 1):
            torch.manual_seed(number)
            config = peft.LoraConfig(
                r=4 * number, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_rslora=number == 2
            )
            if self.model is None:
                self.model = peft.get_peft_model(base, config, name)
            else:
                self.model.add_adapter(name, config)
            for parameter_name, parameter in self.model.named_parameters():
                if f".{name}." in parameter_name:
                    parameter.data = torch.randn_like(parameter) * 0.1
            self.model.set_adapter(name)
            self._answers[name] = self._of(self.model.eval())
        self.model.save_pretrained(root)  # a folder for each
        self.root = root

    def _of(self, model: Any) -> list[str]:
        found = []
        for prompt in PROMPTS:
            ids = self._tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=BODY["max_tokens"],
                min_new_tokens=BODY["max_tokens"],
                eos_token_id=None,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
            found.append(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return found

    def answers(self, name: str) -> list[str]:
        return self._answers[name]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    torch.set_num_threads(1)
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def cluster(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two slots for three adapters; few blocks, so that sequences are preempted; two proxies, of which each request
    reaches any; prefill in two stages of two ranks."""
    with Cluster(
        decode=2,
        prefill_args=("--tp", "2", "--pp", "2"),
        proxies=2,
        proxy_args=(
            *("--local-prefill", "never", "--lora-modules", f"one={adapters.root / 'one'}"),
            *("--adapter-root", str(adapters.root)),
        ),
        worker_args=("--max-loras", "2", "--num-blocks", "40"),
        decode_step_s=0.004,
        log_folder=tmp_path_factory.mktemp("logs"),
    ) as started:
        yield started


def post(cluster: Cluster, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{cluster.url}{path}", json=body, timeout=60)


def served(cluster: Cluster) -> set[str]:
    """Names that one of the proxies has."""
    return {each["id"] for each in httpx.get(f"{cluster.url}/v1/models", timeout=60).json()["data"]}


def begin(cluster: Cluster, name: str, number: int) -> Stream:
    return cluster.begin(PROMPTS[number], **(BODY | {"model": name}))


def demand(stream: Stream, expected: list[str]) -> None:
    stream.join()
    assert stream.error is None and stream.broken is None, (stream.error, stream.broken)
    assert stream.text in expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_answers_are_those_of_peft_through_loads_kills_and_swaps(cluster: Cluster, adapters: Adapters) -> None:
    """Guards against a single token of a wrong adapter: by slots that are shared, KV of the same prompt with another
    adapter, a worker that dies, a name that means another adapter while requests run."""
    assert post(cluster, "/v1/completions", model="two", prompt="x").status_code == 404
    for name in ("two", "three"):
        answer = post(cluster, "/v1/load_lora_adapter", lora_name=name, lora_path=name)
        assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    listed = {each["id"]: each for each in httpx.get(f"{cluster.url}/v1/models").json()["data"]}
    assert set(listed) == set(NAMES)
    assert (listed["two"]["parent"], listed["two"]["root"]) == ("demo", "two")

    # All of them at once, twice: the second time prefixes are cached. A decode worker dies in between.
    for kills in (False, True):
        cases = [(name, number) for number in range(len(PROMPTS)) for name in NAMES]
        streams = [begin(cluster, *case) for case in cases]
        if kills:
            cluster.wait_until(lambda: any(each.num_chunks > 3 for each in streams), "tokens")  # noqa: B023
            cluster.nodes.kill("decode-1")
        for (name, number), stream in zip(cases, streams, strict=True):
            demand(stream, [adapters.answers(name)[number]])

    # A name becomes another adapter, and back, while requests for it run.
    pairs = {number: [adapters.answers(name)[number] for name in ("two", "three")] for number in range(len(PROMPTS))}
    assert all(len(set(each)) == 2 for each in pairs.values()), "the two adapters say the same"
    numbers, running = cycle(pairs), []
    for path in ("three", "two", "three"):
        before = [(number, begin(cluster, "two", number)) for number, _ in zip(numbers, range(2), strict=False)]
        running += before
        answer = post(cluster, "/v1/load_lora_adapter", lora_name="two", lora_path=path, load_inplace=True)
        assert answer.status_code == 200, answer.text
        running += [(number, begin(cluster, "two", number)) for number, _ in zip(numbers, range(2), strict=False)]
    for number, stream in running:
        demand(stream, pairs[number])
    demand(begin(cluster, "two", 0), [adapters.answers("three")[0]])

    # Names outlive proxies.
    for proxy in ("proxy-0", "proxy-1"):
        cluster.nodes.kill(proxy)
    cluster.nodes.revive()
    for _ in range(8):
        assert served(cluster) == set(NAMES)
    demand(begin(cluster, "two", 0), [adapters.answers("three")[0]])

    # Requests that run when a name is removed end as they began.
    last = begin(cluster, "one", 1)
    cluster.wait_until(lambda: last.num_chunks > 0, "a token")
    assert post(cluster, "/v1/unload_lora_adapter", lora_name="one").status_code == 200
    demand(last, [adapters.answers("one")[1]])
    for _ in range(8):
        assert served(cluster) == {*NAMES} - {"one"}


def test_folders_that_hold_no_adapter_of_the_model_are_refused(cluster: Cluster, adapters: Adapters) -> None:
    """By a worker, which knows the model: the proxy only reads the configuration."""
    broken = adapters.root / "broken"
    shutil.copytree(adapters.root / "one", broken)
    config = broken / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    answer = post(cluster, "/v1/load_lora_adapter", lora_name="broken", lora_path="broken")
    assert answer.status_code == 400 and "by the model and the configuration [5, 768]" in answer.text
