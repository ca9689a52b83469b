"""lm-evaluation-harness, unchanged: log likelihoods and generation of three local rows by its `local-completions`.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] has the rows, their log likelihoods
and greedy flags by transformers, and the tokenizer's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
TOLERANCE = 1e-4
TASKS = {
    "rows_loglikelihood": {"output_type": "loglikelihood", "doc_to_target": "{{continuation}}"},
    "rows_generated": {
        "output_type": "generate_until",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": WANTED["max_tokens"], "temperature": 0.0},
    },
}


def evaluate(folder: Path, **model_args: Any) -> dict[str, list[Any]]:
    """The answers to the rows, by task, in the order of the rows."""
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": "demo", "base_url": f"{BASE_URL}/completions", **model_args},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {task: sorted(found["samples"][task], key=lambda sample: sample["doc_id"]) for task in TASKS}
    return {task: [sample["filtered_resps"][0] for sample in rows] for task, rows in samples.items()}


def write_tasks(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in WANTED["rows"]))
    for name, fields in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc" if name == "rows_loglikelihood" else "exact_match"}],
            **fields,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))


def check(answers: dict[str, list[Any]]) -> None:
    for (found, greedy), row in zip(answers["rows_loglikelihood"], WANTED["rows"], strict=True):
        assert abs(found - row["loglikelihood"]) < TOLERANCE, (found, row)
        assert greedy is row["greedy"], (greedy, row)
    assert answers["rows_generated"] == [row["generated"] for row in WANTED["rows"]], answers


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder)
        check(evaluate(folder, tokenizer_backend="huggingface", tokenizer=WANTED["folder"], batch_size=3))
        check(evaluate(folder, tokenizer_backend="remote", batch_size=1, num_concurrent=2))
