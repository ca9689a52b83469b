"""The GPU's runner on CPU tensors, its kernels interpreted and run as late as can be: against the CPU's runner."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.decoder import DenseDecoder
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import Policy, fastest, invariant, untuned
from baton.models.cuda.runner import CudaRunner
from baton.models.quantization.recipe import RECIPES
from baton.models.weights import load_weights
from baton.node.errors import InvariantBroken
from baton.node.messages.control import SamplingSpec
from baton.testing.coded_inputs import RUNS, with_coded_inputs
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.conftest import kv_pool
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, mask_after, one_after_the_other
from baton.tests.unit.models.quantization.test_tokens import quantise
from baton.tests.unit.models.quantization.writers import FORMATS

BLOCK = 16


def split_in_two(num_rows, shape):
    """Parts of sums, as the tables of large models have them."""
    tiles = untuned(num_rows, shape)
    if shape.fused or shape.inputs % 32:
        return tiles
    return type(tiles)(16, 16, 16, 3, 2, prefetch=0)


def make(
    folder,
    *,
    max_rows: int = 2,
    run_ahead: int = 1,
    policy: Policy = fastest,
    spare_layers=0,
    keep_quantised=False,
    kv_dtype="auto",
    **limits,
):
    """A runner as it would be on a GPU, and the CPU's, each over an empty pool of 24 blocks; the former's units have
    room for more layers behind them, which no kernel may read."""
    plain = ModelRunner.load(folder, kv_dtype=kv_dtype)
    plain.bind_pool(*kv_pool(plain, 24, BLOCK))
    weights = load_weights(plain.config, folder, torch.float32, pack=False, keep_quantised=keep_quantised)
    step_limits = StepLimits(max_rows, 64, run_ahead, **limits)
    late = CudaRunner(plain.config, weights, LateQueue(), step_limits, 512, policy, plain.kv_format)
    if kv_dtype != "auto":
        data, scales = kv_pool(plain, 24, BLOCK)
        late.bind_pool(data, 96, scales=scales)
        return late, plain
    pool = torch.zeros(plain.kv_shape(24, BLOCK))
    layers = pool.shape[2]
    pool = torch.cat((pool, torch.full_like(pool[:, :, :1], float("nan")).repeat(1, 1, spare_layers, 1, 1, 1)), dim=2)
    late.bind_pool(pool[:, :, :layers], 96)
    return late, plain


PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 19}),
    "phi3": ("phi3", {"rope_parameters": PARTIAL, "pad_token_id": 0}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 19, "attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 40}),
    "gemma3": ("gemma3", {"sliding_window": 19, "query_pre_attn_scalar": 40, "final_logit_softcapping": 9.0}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_cpu_s(make_model, family):
    """Guards every family's part: biases, norms of heads, window, and a chunk that follows a cached prefix."""
    name, config = FAMILIES[family]
    late, plain = make(make_model(name, num_hidden_layers=2, **config).folder, policy=fastest)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    first = [Row(list(range(3, 25)), 0, [5, 2, 9], None), Row([7, 8, 9], 0, [1], draw)]
    then = [Row(list(range(40, 60)), 22, [5, 2, 9], draw)]
    for rows in (first, then):
        torch.testing.assert_close(late.logits(rows), plain.compute(rows)[1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["fp8, blocks of 128", "gptq, desc_act"])
def test_weights_that_stay_quantised_give_the_logits_of_those_that_do_not(make_model, name):
    """Guards products whose weight is made plain for each: a merged projection, gate and up, and a head."""
    made = make_model("llama", vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    quantise(made, FORMATS[name])
    late, plain = make(made.folder, keep_quantised=True)
    rows = [Row(list(range(3, 25)), 0, [5, 2, 9], Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0))]
    torch.testing.assert_close(late.logits(rows), plain.compute(rows)[1], rtol=2e-4, atol=2e-4)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "int8"])
def test_steps_in_codes_give_the_logits_of_a_fake_quantised_forward(make_model, name):
    """Guards every place where inputs are put into codes: norms, silu and attention, in a prompt, in a chunk behind it
    and with the rows of another; and that the codes are those which the next product takes."""
    folder, recipe = make_model("llama", **WIDE).folder, RECIPES[name]
    config = ModelConfig.from_folder(folder)
    kept, plain = (
        load_weights(config, folder, torch.float32, pack=False, recipe=recipe, keep_quantised=keep)
        for keep in (True, False)
    )
    late = CudaRunner(config, kept, LateQueue(), StepLimits(2, 64), 512)
    code_type = torch.int8 if name == "int8" else torch.float8_e4m3fn
    coded = with_coded_inputs(plain, code_type, RUNS if name == "fp8_block" else None)
    references = [ModelRunner(config, DenseDecoder(config, each), torch.float32) for each in (coded, plain)]
    late.bind_pool(torch.zeros(references[0].kv_shape(24, BLOCK)), 96)
    for reference in references:
        reference.bind_pool(torch.zeros(reference.kv_shape(24, BLOCK)))
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    first = [Row(list(range(3, 25)), 0, [5, 2, 9], draw), Row([7, 8, 9], 0, [1], draw)]
    for rows in (first, [Row([40], 22, [5, 2, 9], draw)]):
        ours, (of_codes, exact) = late.logits(rows), [reference.compute(rows)[1] for reference in references]
        # A sum in another order may round an input to the code beside: a whole step of it.
        assert (ours - of_codes).norm() < 0.5 * (ours - exact).norm()
        assert (ours - of_codes).norm() / exact.norm() < 0.01


PROMPTS = {0: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], 1: [2, 7], 2: [10, 20, 30, 40, 50]}
TABLES = {0: [4, 11, 2], 1: [7, 0], 2: [9, 3, 5]}


@pytest.mark.parametrize(  # every pair of the three, not every three
    ("policy", "run_ahead", "mixed_tokens"),
    [(split_in_two, 0, 1), (split_in_two, 2, 64), (invariant, 2, 1), (invariant, 0, 64)],
    ids=["split one pass", "split ahead two launches", "deterministic ahead one pass", "deterministic two launches"],
)
def test_steps_ahead_of_the_host_give_the_cpu_s_tokens(make_model, policy, run_ahead, mixed_tokens):
    """Guards the slots: tokens that only the device knows, blocks that are added, rows that pause, come and go, a slot
    that changes its owner, and steps of prompts between and in steps of decoding."""
    folder = make_model("llama", num_hidden_layers=1, vocab_size=144).folder
    limits = {"deterministic": policy is invariant, "mixed_tokens": mixed_tokens}
    late, plain = make(folder, run_ahead=run_ahead, policy=policy, **limits)
    run = Ahead(late)
    run.start(0, PROMPTS[0], TABLES[0])
    run.start(1, PROMPTS[1], TABLES[1], temperature=1.1, seed=(5 << 33) + 7)
    run.launch([0, 1], chunk=9)  # a part of one prompt beside the whole of another
    run.launch([0, 1], chunk=9)
    for _ in range(5):
        run.launch([1, 0])
    run.launch([0])
    found = {1: run.generated(1)}
    edited = {"temperature": 0.7, "top_p": 0.93, "seed": 3, "frequency_penalty": 1.6, "logit_bias": ((30, 4.0),)}
    run.start(1, PROMPTS[2], TABLES[2], **edited)  # beside a row that wants none of this
    for slots in ([0, 1], [1], [0, 1], [1, 0]):
        run.launch(slots)
    found |= {0: run.generated(0), 2: run.generated(1)}
    assert [len(found[name]) for name in (0, 1, 2)] == [10, 7, 4]
    assert found[0] == one_after_the_other(plain, PROMPTS[0], TABLES[0], 10)
    assert found[1] == one_after_the_other(plain, PROMPTS[1], TABLES[1], 7, temperature=1.1, seed=(5 << 33) + 7)
    assert found[2] == one_after_the_other(plain, PROMPTS[2], TABLES[2], 4, **edited)


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_bad_words_know_tokens_that_the_host_has_not_read(make_model, run_ahead):
    """Guards against a word whose beginning was drawn by a step that is still in flight, and against a slot that knows
    the last tokens of the sequence before."""
    folder = make_model("llama", num_hidden_layers=1, vocab_size=144).folder
    late, plain = make(folder, run_ahead=run_ahead)
    greedy = one_after_the_other(plain, PROMPTS[2], TABLES[2], 6)
    words = {
        "bad_words": (tuple(greedy[:3]), (greedy[0], greedy[1], greedy[2], 9), tuple(PROMPTS[2][-1:] + greedy[:1]))
    }
    expected = one_after_the_other(plain, PROMPTS[2], TABLES[2], 6, **words)
    assert expected[:2] == greedy[:2] and expected[2] != greedy[2]
    again = {"bad_words": (tuple(greedy[:1] + expected[1:4]),), "allowed_token_ids": tuple(range(1, 144))}
    then = one_after_the_other(plain, PROMPTS[2], TABLES[2], 6, **again)
    run = Ahead(late)
    run.start(1, PROMPTS[1], TABLES[1])
    for params, wanted in ((words, expected), (again, then)):
        run.start(0, PROMPTS[2], TABLES[2], **params)
        run.launch([0])
        for slots in ([0, 1], [0], [1, 0], [0], [0]):
            run.launch(slots)
        assert run.generated(0) == wanted


@pytest.mark.parametrize("mixed_tokens", [1, 64], ids=["one pass", "two launches"])
def test_masked_rows_draw_what_their_masks_allow(make_model, mixed_tokens):
    """Guards against a mask of another row or step, free rows that change beside masked ones, and decode rows that
    draw from the logits of the prompts launched behind them."""
    folder = make_model("llama", num_hidden_layers=1, vocab_size=144).folder
    late, plain = make(folder, max_rows=3, mixed_tokens=mixed_tokens)
    masked = {"grammar": GRAMMAR, "temperature": 0.9, "seed": 11, "repetition_penalty": 1.2}
    run = Ahead(late)
    run.start(0, PROMPTS[0], TABLES[0], grammar=GRAMMAR)
    run.start(1, PROMPTS[1], TABLES[1], temperature=1.1, seed=5)
    for slots in ([0, 1], [0, 1], [1], [0, 1]):
        run.launch(slots)
    run.start(2, PROMPTS[2], TABLES[2], **masked)
    run.launch([0, 1, 2], chunk=3)
    run.launch([1, 2, 0], chunk=3)
    for slots in ([2, 0, 1], [2], [0, 1]):
        run.launch(slots)
    found = {slot: run.generated(slot) for slot in (0, 1, 2)}
    assert [len(found[slot]) for slot in (0, 1, 2)] == [7, 8, 3]
    assert found[0] == one_after_the_other(plain, PROMPTS[0], TABLES[0], 7, grammar=GRAMMAR)
    assert found[1] == one_after_the_other(plain, PROMPTS[1], TABLES[1], 8, temperature=1.1, seed=5)
    assert found[2] == one_after_the_other(plain, PROMPTS[2], TABLES[2], 3, **masked)
    known = list(PROMPTS[0])
    for token_id in found[0]:
        assert token_id % 3 == sum(known) % 3
        known.append(token_id)


def test_a_step_with_masked_draws_waits_for_its_masks(make_model):
    """Guards against a worker that reads tokens which no grammar has seen, on either device."""
    folder = make_model("llama", num_hidden_layers=1, vocab_size=144).folder
    for runner in make(folder):
        draw = Draw(SamplingSpec(max_tokens=9, grammar=GRAMMAR), PROMPTS[1], 2, 0)
        step = runner.launch([Row(PROMPTS[1], 0, TABLES[1], draw)])
        with pytest.raises(InvariantBroken, match="not completed"):
            step.read()
        free = runner.launch([Row(PROMPTS[1], 0, TABLES[1], draw._replace(sampling=SamplingSpec(max_tokens=9)), 1)])
        with pytest.raises(InvariantBroken):
            free.complete(mask_after(PROMPTS[1], 144)[None])


@pytest.mark.parametrize("spare_layers", [0, 1])
def test_a_sequence_in_parts_gives_the_cpu_s_tokens(make_model, spare_layers):
    """Guards attention of a sequence that programs share, alone and beside a short one: that the graph of a step shares
    out by the lengths it is given, not by those that it was captured with. And blocks with room for more layers."""
    folder = make_model("llama", num_hidden_layers=1, vocab_size=144).folder
    late, plain = make(folder, spare_layers=spare_layers)
    prompt = [(7 * place) % 140 + 2 for place in range(70)]
    tables = {0: [4, 11, 2, 9, 17, 20], 1: [7, 0]}
    run = Ahead(late)
    run.start(0, prompt, tables[0])
    run.start(1, PROMPTS[1], tables[1])
    run.launch([0], chunk=60)
    for slots in ([0], [0], [0], [0, 1], [0, 1], [1, 0], [0]):
        run.launch(slots)
    assert run.generated(0) == one_after_the_other(plain, prompt, tables[0], 7)
    assert run.generated(1) == one_after_the_other(plain, PROMPTS[1], tables[1], 3)


def test_log_probabilities_come_with_their_rows(make_model):
    """Guards a step's log probabilities against another row's, and against those of the step launched behind it."""
    late, plain = make(make_model("llama", num_hidden_layers=1, vocab_size=144).folder, run_ahead=1)
    sampling = SamplingSpec(max_tokens=9, temperature=0.0, logprobs=True, top_logprobs=2)
    quiet = SamplingSpec(max_tokens=9, temperature=0.0)
    wants, none = Draw(sampling, (), 2, 0), Draw(quiet, (), 2, 0)
    prompts = [Row([5, 6], 0, [1], none, 0), Row([7, 8], 0, [2], wants, 1)]
    after = [Row([], 2, [2], Draw(sampling, (), 2, 1), 1), Row([], 2, [1], Draw(quiet, (), 2, 1), 0)]
    steps = [late.launch(prompts), late.launch(after)]
    (_, first), (second, last) = (step.read() for step in steps)
    assert last is not None and not last.logprobs
    expected = plain.step(prompts)[1]
    assert expected is not None
    expected_then = plain.step([Row([expected.token_ids[0]], 2, [2], Draw(sampling, (), 2, 1))])[0]
    for found, wanted in ((first, expected), (second, expected_then)):
        assert found is not None and found.logprobs and wanted is not None and wanted.logprobs
        assert found.token_ids[0] == wanted.token_ids[0]
        assert found.logprobs[0].logprob == pytest.approx(wanted.logprobs[0].logprob, abs=1e-4)
        assert [token for token, _ in found.logprobs[0].top] == [token for token, _ in wanted.logprobs[0].top]


def test_an_unread_step_keeps_its_result(make_model):
    """Guards against a result that a later step overwrites before it is read, and against launching without bound."""
    late, _ = make(make_model("llama", num_hidden_layers=1, vocab_size=144).folder, run_ahead=1)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 3, 0)
    launched = [late.launch([Row([5, 6, token], 0, [token], draw, 0)]) for token in (1, 2)]
    with pytest.raises(InvariantBroken, match="not read"):
        late.launch([Row([1], 0, [1], None)])
    first, second = (step.read() for step in launched)
    assert first == late.launch([Row([5, 6, 1], 0, [3], draw, 0)]).read()
    assert second == late.launch([Row([5, 6, 2], 0, [3], draw, 0)]).read() != first
