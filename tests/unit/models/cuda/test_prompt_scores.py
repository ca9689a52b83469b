"""Log probabilities of prompts by the GPU's runner, run late on CPU tensors: equal to those of the CPU's runner."""

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, PromptTargets, Row
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.models.cuda.test_runner import make

GREEDY = Draw(SamplingSpec(max_tokens=9, temperature=0.0, logprobs=True, top_logprobs=2), (), 0, 0)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_scores_equal_the_cpu_s(make_model, run_ahead):
    """Guards parts of the head that are larger than a row's targets, or smaller; entries of another row; a prompt in
    chunks of which only the last draws; and a plain step between them that shares the buffers."""
    late, plain = make(make_model("llama", num_hidden_layers=2).folder, max_rows=3, run_ahead=run_ahead)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
    steps = [
        [
            Row(prompt[:11], 0, [5, 2, 9], None, 0, PromptTargets(4, prompt[5:12], 2)),
            Row([7, 8, 9], 0, [1], GREEDY, 1),
            Row([6, 2], 0, [3], GREEDY, 2, PromptTargets(0, [2], 20)),
        ],
        [Row([11, 12], 0, [7], GREEDY, 2)],
        [Row(prompt[11:], 11, [5, 2, 9], GREEDY, 0, PromptTargets(0, prompt[12:], 0))],
    ]
    launched = []
    for rows in steps:
        launched.append(late.launch(rows))
        if len(launched) > run_ahead:
            check(launched.pop(0), plain.launch(steps[steps.index(rows) - run_ahead]))
    for step, rows in zip(launched, steps[len(steps) - run_ahead :], strict=True):
        check(step, plain.launch(rows))


def check(found, expected):
    drawn = found.read()
    assert [entry and entry.token_ids for entry in drawn] == [entry and entry.token_ids for entry in expected.read()]
    assert found.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
    for row, entries in expected.prompt_logprobs.items():
        for one, other in zip(found.prompt_logprobs[row], entries, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3) and one.rank == other.rank
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
