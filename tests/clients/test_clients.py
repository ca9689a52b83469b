"""Clients that users have, each unchanged, in an environment of its own, against one server with the demo model.

Every script in this folder is one client. It gets the server's URL, what `transformers` answers and how to draw answers
of a given form, and ends with an error if anything is not as it should be. `install` makes their environments
(scripts/test runs it); without them the tests skip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.tests.integration.cluster import Cluster

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "models" / "demo"
PYTHON_CLIENTS = (
    "openai_python",
    "openai_python_tools",
    "openai_python_responses",
    "openai_agents_runs",
    "litellm_calls",
    "langchain_calls",
    "langchain_agents",
    "instructor_modes",
    "pydantic_ai_agents",
    "guidellm_load",
    "lm_eval_rows",
    "anthropic_python",
)
NODE_CLIENTS = ("openai_node", "openai_node_tools", "vercel_ai", "vercel_ai_tools", "opencode_turns")
STAMPS = {"python": HERE / ".venv" / "installed", "node": HERE / "node_modules" / "installed"}
TIMEOUT_S = 800.0
MAX_TOKENS = 24
PROMPT = "Once upon a time there was a little fox who lived in the forest with his mother. One day"
MESSAGES = [{"role": "user", "content": "Please tell me a long and happy story about a little dog and a red ball."}]
DRAWN = {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 2.0, "max_tokens": 200}
"""How answers of a given form are drawn: penalties keep the model from long white space between tokens of JSON."""
ROWS = (
    (PROMPT, ", the fox decided to go for a walk."),
    ("The little dog saw a red ball and", " swallowed seventeen encyclopedias"),
    ("She was", " happy"),
)
"""Contexts and continuations for lm-eval: what the model would say, what it would not, and one of a single token."""

pytestmark = pytest.mark.clients


class Reference:
    """What transformers computes with the demo model in float32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self._model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()

    def wanted(self) -> dict[str, Any]:
        """The case that every script gets, as JSON."""
        chat = self._tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        return {
            "folder": str(DEMO),
            "max_tokens": MAX_TOKENS,
            "prompt": PROMPT,
            "completion": self._generate(self._tokenizer(PROMPT).input_ids),
            "messages": MESSAGES,
            "chat": self._generate(chat),
            "chat_prompt_tokens": len(chat),
            "drawn": DRAWN,
            "ends_objects": {self._tokenizer.convert_tokens_to_ids("}"): 100},  # these two are a logit_bias
            "forbids_end": dict.fromkeys(self._model.generation_config.eos_token_id, -100),
            "rows": [self._row(context, continuation) for context, continuation in ROWS],
        }

    def _row(self, context: str, continuation: str) -> dict[str, Any]:
        ids, start = self._encode(context + continuation), len(self._encode(context))
        with torch.inference_mode():
            logprobs = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        target = torch.tensor(ids[start:])
        given = logprobs[start - 1 : -1]
        return {
            "context": context,
            "continuation": continuation,
            "loglikelihood": given.gather(1, target[:, None]).sum().item(),
            "greedy": bool((given.argmax(-1) == target).all()),
            "generated": self._generate(self._encode(context)).split("\n")[0],
        }

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _generate(self, ids: list[int]) -> str:
        with torch.inference_mode():
            out = self._model.generate(
                torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1, repetition_penalty=1.0
            )
        return str(self._tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


@cache
def missing(language: str) -> str:
    """Why the clients of a language cannot run here; empty if they can."""
    if STAMPS[language].exists():
        return ""
    log = HERE / ".logs" / language
    return log.read_text().strip()[-300:] if log.exists() else "not installed: run scripts/test tests/clients"


def require(language: str) -> None:
    """Skip, and say so in the summary of the run."""
    if reason := missing(language):
        warnings.warn(f"clients in {language} are not tested: {reason}", stacklevel=1)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def wanted() -> str:
    return json.dumps(Reference().wanted())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With drafts, which change no answer: names that a schema prescribes then take no steps of their own."""
    args = ("--speculate", "ngram")
    with Cluster(decode_args=args, log_folder=tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


def run(command: list[str | Path], folder: Path) -> None:
    """The script must end with 0, within a bound; else its output is the error."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SSL_CERT_FILE") if name in os.environ}
    quiet = {
        "HOME": str(folder),  # caches and settings of the clients
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",  # else each of its processes imports all of it, in 7 s of CPU time
        "OPENAI_API_KEY": "none",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env={**kept, **quiet},
        timeout=TIMEOUT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def test_every_script_is_run() -> None:
    """Guards a script that is in no list against rotting."""
    scripts = {path.name for path in HERE.iterdir() if path.suffix in (".py", ".mjs")} - {Path(__file__).name}
    assert scripts == {f"{client}.py" for client in PYTHON_CLIENTS} | {f"{client}.mjs" for client in NODE_CLIENTS}


@pytest.mark.parametrize("client", PYTHON_CLIENTS)
def test_clients_in_python_work_unchanged(client: str, cluster: Cluster, wanted: str, tmp_path: Path) -> None:
    """Guards what these clients send, and how they read answers, streams, calls, usage and errors."""
    require("python")
    script = HERE / f"{client}.py"
    run([HERE / ".venv" / "bin" / "python", "-P", script, f"{cluster.url}/v1", wanted], tmp_path)
    cluster.wait_idle()


@pytest.mark.parametrize("client", NODE_CLIENTS)
def test_clients_in_javascript_work_unchanged(client: str, cluster: Cluster, wanted: str, tmp_path: Path) -> None:
    """Guards the same for clients in JavaScript."""
    require("node")
    node = shutil.which("node")
    assert node is not None  # else `install` had failed
    run([node, HERE / f"{client}.mjs", f"{cluster.url}/v1", wanted], tmp_path)
    cluster.wait_idle()
