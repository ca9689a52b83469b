"""Log probabilities of prompts on the CPU: equal to transformers' whatever the steps that a prompt is cut into."""

import pytest
import torch

from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cpu import prompt_scores
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import PromptLogprob, SamplingSpec

GREEDY = Draw(SamplingSpec(max_tokens=1000, temperature=0.0), (), 0, 0)


def scored(runner: ModelRunner, table: list[int], prompt: list[int], chunk: int, num_top: int) -> list[PromptLogprob]:
    """The entries of prompt[1:], computed in chunks."""
    found: list[PromptLogprob] = []
    for start in range(0, len(prompt), chunk):
        end = min(start + chunk, len(prompt))
        last = end == len(prompt)
        targets = PromptTargets(0, prompt[start + 1 : end + 1], num_top)
        row = Row(prompt[start:end], start, table, GREEDY if last else None, 0, targets if targets.token_ids else None)
        launched = runner.launch([row])
        assert (launched.read()[0] is not None) == last
        found += launched.prompt_logprobs.get(0, ())
    return found


@pytest.mark.parametrize("rows", [5, 128])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_equal_transformers(make_model, sequences, monkeypatch, family, chunk, rows):
    """Guards against an entry of another position, and chunks or parts of the head that drop or repeat one."""
    monkeypatch.setattr(prompt_scores, "SCORED_ROWS", rows)
    made = make_model(family)
    runner = ModelRunner.load(made.folder)
    prompt = torch.randint(0, 131, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    found = scored(runner, sequences(runner, 1, 160).tables[0], prompt, chunk, 3)
    with torch.inference_mode():
        expected = made.reference(torch.tensor([prompt])).logits[0].float().log_softmax(-1)[:-1]
    assert len(found) == len(prompt) - 1
    for entry, row, token in zip(found, expected, prompt[1:], strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.rank == int((row > row[token]).sum()) + 1
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert entry.rank > 3 or entry.top[entry.rank - 1] == (token, entry.logprob), "one float for both"


def test_rows_are_scored_beside_others(make_model, sequences):
    """Guards against entries that end at another row, in a step whose rows are laid out in another order."""
    runner = ModelRunner.load(make_model("llama").folder)
    run = sequences(runner, 3, 32)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
    rows = [
        Row(prompt, 0, table, GREEDY if index != 1 else None, 0, targets)
        for index, (prompt, table, targets) in enumerate(
            zip(
                prompts,
                run.tables,
                [PromptTargets(2, prompts[0][3:], 0), PromptTargets(0, [7], 2), PromptTargets(0, prompts[2][1:], 1)],
                strict=True,
            )
        )
    ]
    together = runner.launch(rows)
    for index, row in enumerate(rows):
        alone = runner.launch([row])
        assert alone.read()[0] == together.read()[index]
        assert len(alone.prompt_logprobs[0]) == len(together.prompt_logprobs[index])
        for one, other in zip(alone.prompt_logprobs[0], together.prompt_logprobs[index], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5) and one.rank == other.rank


def test_no_row_wants_scores(make_model, sequences):
    """Guards against work, or entries, in a step of plain rows."""
    runner = ModelRunner.load(make_model("llama").folder)
    run = sequences(runner, 1, 32)
    assert runner.launch([Row([1, 2, 3], 0, run.tables[0], GREEDY)]).prompt_logprobs == {}
