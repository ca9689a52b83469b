"""The runner on a GPU: captured graphs and steps ahead of the host give the CPU's tokens, and repeatable ones.

Run it in a separate process: tests/unit/models would then run on the GPU as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import DenseLinear, ExpertLinears, GroupedLinear, Linear, ScaledLinear
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.decoder import DenseDecoder
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.layer_weights import AttentionWeights, DenseMlpWeights, ExpertsWeights, LayerWeights, Mlp, Weights
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, one_after_the_other

pytestmark = pytest.mark.gpu

SHAPE_8B = Path(__file__).resolve().parents[2] / "benchmark" / "shapes" / "llama-3.1-8b"
LONGEST = 640


def make(folder: Path, dtype: torch.dtype, *, max_rows: int, block_tokens: int = 64, **limits) -> CudaRunner:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, dtype, "cuda:0", pack=False)
    runner = CudaRunner(config, weights, CudaQueue(0), StepLimits(max_rows, 2048, **limits), LONGEST)
    num_blocks = max_rows * -(-LONGEST // block_tokens) + 1
    shape = (num_blocks, config.num_kv_heads, config.num_layers, 2, block_tokens, config.head_dim)
    runner.bind_pool(torch.zeros(shape, dtype=dtype, device="cuda:0"), LONGEST)
    return runner


def table(slot: int, block_tokens: int = 64) -> list[int]:
    width = -(-LONGEST // block_tokens)
    return list(range(1 + slot * width, 1 + (slot + 1) * width))


def prompts(count: int, longest: int = 300) -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(2, 4000) for _ in range(chance.randrange(1, longest))] for _ in range(count)]


def test_what_is_captured_around_a_hole_runs_in_order():
    """Guards pieces that are launched in another order, or with another call's hole between them."""
    queue, x = CudaQueue(0), torch.zeros(1, device="cuda:0")

    def work(hole: Callable[..., None]) -> str:
        for number in (1.0, 10.0):
            x.add_(number)
            hole(x, number)
        x.mul_(3)
        return "made"

    replay, made = queue.capture_around(work), []
    for factor in (2.0, 5.0):
        queue.enqueue(lambda: x.zero_())
        queue.enqueue(lambda factor=factor: made.append(replay(lambda y, number, f=factor: y.mul_(f).add_(number))))
        queue.mark().wait()
        assert x.item() == 3 * (((1 * factor + 1) + 10) * factor + 10)
    assert made == ["made", "made"]


def generate(runner: CudaRunner, made: list[list[int]], count: int, chunk: int, **params) -> list[list[int]]:
    """`count` tokens after each prompt, in one batch; prompts are computed in chunks of `chunk`, a few at a time."""
    run, done = Ahead(runner), []
    for slot, prompt in enumerate(made):
        run.start(slot, prompt, table(slot), **{**params, "seed": slot + 1})
        while run.computed[slot] < len(prompt):
            run.launch([slot, *done[-3:]], chunk)  # decoding goes on beside it
        done.append(slot)
    slots = list(range(len(made)))
    while any(len(run.known[slot]) < len(made[slot]) + count for slot in slots):
        run.launch(slots)
    return [run.generated(slot)[:count] for slot in slots]


def test_tokens_equal_the_cpu_s():
    """Guards the whole runner: in float32 the greedy tokens equal the CPU's for any batch."""
    folder, made = locate_model("demo"), prompts(7)
    found = generate(make(folder, torch.float32, max_rows=8), made, 24, 100)
    plain = ModelRunner.load(folder)
    plain.bind_pool(torch.zeros(plain.kv_shape(42, 16)))
    for prompt, tokens in zip(made, found, strict=True):
        assert tokens == one_after_the_other(plain, prompt, list(range(1, 41)), 24)


def test_every_sampling_parameter_samples_as_on_the_cpu():
    """Guards filters, penalties and log probabilities in mixed batches that run ahead of the host."""
    folder, made = locate_model("demo"), prompts(5)
    params = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "frequency_penalty": 0.4,
        "repetition_penalty": 1.1, "logit_bias": ((5, 2.0),), "min_tokens": 4, "stop_token_ids": (1,),
    }  # fmt: skip
    runner = make(folder, torch.float32, max_rows=8)
    found, greedy = generate(runner, made, 24, 100, **params), generate(runner, made, 24, 100)
    plain = ModelRunner.load(folder)
    plain.bind_pool(torch.zeros(plain.kv_shape(42, 16)))
    blocks = list(range(1, 41))
    for slot, prompt in enumerate(made):
        assert found[slot] == one_after_the_other(plain, prompt, blocks, 24, **params, seed=slot + 1)
        assert greedy[slot] == one_after_the_other(plain, prompt, blocks, 24)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0, logprobs=True, top_logprobs=3), (), 1, 0)
    device = runner.launch([Row(made[0], 0, table(0), draw), Row(made[1], 0, table(1), draw, 1)]).read()
    for prompt, entry in zip(made, device, strict=False):
        expected = plain.step([Row(prompt, 0, blocks, draw)])[0]
        assert entry is not None and expected is not None and entry.logprobs and expected.logprobs
        assert [token for token, _ in entry.logprobs[0].top] == [token for token, _ in expected.logprobs[0].top]
        assert entry.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=1e-3)


def test_masked_rows_draw_as_on_the_cpu():
    """Guards steps that draw when their masks come: beside free rows, with parts of prompts, running ahead."""
    folder, made = locate_model("demo"), prompts(6)
    runner = make(folder, torch.float32, max_rows=8)
    run, params = Ahead(runner), {"temperature": 0.8, "repetition_penalty": 1.1}
    for slot, prompt in enumerate(made):
        masked = {"grammar": GRAMMAR} if slot % 2 else {}
        run.start(slot, prompt, table(slot), **params, **masked, seed=slot + 1)
        while run.computed[slot] < len(prompt):
            run.launch([*range(max(0, slot - 2), slot), slot], 100)
    while any(len(run.known[slot]) < len(prompt) + 24 for slot, prompt in enumerate(made)):
        run.launch(list(range(len(made))), 100)
    plain = ModelRunner.load(folder)
    plain.bind_pool(torch.zeros(plain.kv_shape(42, 16)))
    for slot, prompt in enumerate(made):
        masked = {"grammar": GRAMMAR} if slot % 2 else {}
        expected = one_after_the_other(plain, prompt, list(range(1, 41)), 24, **params, **masked, seed=slot + 1)
        assert run.generated(slot)[:24] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_running_ahead_changes_no_token(temperature):
    """Guards against a step that reads inputs the host has overwritten, or a slot that is not written yet."""
    folder, made = locate_model("demo"), prompts(33)
    results = [
        generate(make(folder, torch.bfloat16, max_rows=40, run_ahead=ahead), made, 40, 128, temperature=temperature)
        for ahead in (0, 1, 3)
    ]
    assert results[0] == results[1] == results[2]


def test_deterministic_tokens_do_not_depend_on_the_batch():
    """Guards --deterministic: 64 sequences in one batch, each alone, and with other chunks, give the same tokens; some
    are longer than one attention program reads."""
    folder, made = locate_model("demo"), prompts(64, longest=590)
    alone = (0, 12, 15, 63)
    assert len(made[12]) > 512 < len(made[15])
    runner = make(folder, torch.bfloat16, max_rows=64, deterministic=True)
    together = generate(runner, made, 32, 96, temperature=0.8)
    again = generate(runner, made, 32, 256, temperature=0.8)
    assert together == again
    for slot in alone:
        run = Ahead(runner)
        run.start(slot, made[slot], table(slot), temperature=0.8, seed=slot + 1)
        for _ in range(32 + 12):  # a prompt has twelve parts at most
            run.launch([slot], 50)
        assert run.generated(slot)[:32] == together[slot][:32]


SHAPES = {
    "llama-3.1-8b": {},
    "phi-3-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 96,
        "vocab_size": 32064,
        "sliding_window": 200,
        "rope_scaling": None,
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "partial_rotary_factor": 0.75,
        "rope_scaling": None,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 200,
        "attn_logit_softcapping": 2.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 200,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
}
"""What differs from the 8B shape; all of two layers."""


def two_layers(folder: Path, shape: str = "llama-3.1-8b") -> Path:
    whole = json.loads((SHAPE_8B / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"num_hidden_layers": 2} | SHAPES[shape]))
    return folder


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_real_models_match_the_cpu(tmp_path, shape, deterministic):
    """Guards the tuned kernels, split sums and Hopper attention in place: logits of a prompt, and tokens of captured
    steps after it, which must be among the most likely by the CPU's float32 logits."""
    config = ModelConfig.from_folder(two_layers(tmp_path, shape))
    weights = load_weights(config, tmp_path, torch.bfloat16, "cuda:0", "dummy", pack=False)
    runner = CudaRunner(config, weights, CudaQueue(0), StepLimits(40, 2048, 1, deterministic), LONGEST)
    pool_shape = (400, config.num_kv_heads, 2, 2, 64, config.head_dim)
    runner.bind_pool(torch.zeros(pool_shape, dtype=torch.bfloat16, device="cuda:0"), LONGEST)
    prompt = [random.Random(3).randrange(32_000) for _ in range(300)]
    draw = Draw(SamplingSpec(max_tokens=99, temperature=0.0), (), 300, 0)
    whole = runner.logits([Row(prompt, 0, table(0), draw)]).float().cpu()
    runner.logits([Row(prompt[:128], 0, table(1), draw)])
    parts = runner.logits([Row(prompt[128:], 128, table(1), draw)]).float().cpu()
    if deterministic:
        assert torch.equal(whole, parts)
    run = Ahead(runner)
    for slot in range(9):  # the same sequence in every row
        run.start(slot, prompt, table(slot))
    run.launch([0, 1, 2], chunk=1000)
    run.launch(list(range(3, 9)), chunk=1000)
    for _ in range(6):
        run.launch([0])
        run.launch(list(range(1, 9)))
    found = [run.generated(slot)[:6] for slot in range(9)]
    known = prompt + found[0]
    exact = exact_logits(config, weights, known)
    assert (whole - exact[299]).norm() / exact[299].norm() < 0.02
    for step in range(6):
        row = exact[299 + step]
        assert row.max() - row[known[300 + step]] < 0.05 * row.std(), step
    assert not deterministic or all(tokens == found[0] for tokens in found)


def exact_logits(
    config: ModelConfig, weights, tokens: list[int], edit: Callable[[Weights], Weights] = lambda weights: weights
) -> torch.Tensor:
    """float32 [tokens, vocab] by the CPU's operations on the same weights, edited."""

    def wide(linear: Linear) -> DenseLinear:
        assert linear.bias is None
        if isinstance(linear, ScaledLinear | GroupedLinear):
            return DenseLinear(linear.dequantised(torch.float32).cpu())
        assert isinstance(linear, DenseLinear)
        return DenseLinear(linear.weight.float().cpu())

    def plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.float().cpu()

    def wide_experts(experts: ExpertLinears) -> ExpertLinears:
        return ExpertLinears(wide(experts.stacked), experts.num_experts)

    def wide_mlp(mlp: Mlp) -> Mlp:
        if isinstance(mlp, DenseMlpWeights):
            return DenseMlpWeights(wide(mlp.gate_up), wide(mlp.down))
        assert mlp.correction is mlp.shared is None
        return ExpertsWeights(wide(mlp.router), None, wide_experts(mlp.gate_up), wide_experts(mlp.down), None, None)

    layers = tuple(
        LayerWeights(
            each.shape,
            each.input_norm.float().cpu(),
            AttentionWeights(wide(each.attention.qkv), plain(each.attention.head_norms), wide(each.attention.o)),
            each.post_norm.float().cpu(),
            wide_mlp(each.mlp),
            plain(each.attention_output_norm),
            plain(each.mlp_output_norm),
        )
        for each in weights.layers
    )
    whole = Weights(weights.embedding.float().cpu(), layers, weights.norm.float().cpu(), wide(weights.lm_head))
    cpu = ModelRunner(config, DenseDecoder(config, edit(whole)), torch.float32)
    cpu.bind_pool(torch.zeros(cpu.kv_shape(6, 64)))
    draw = Draw(SamplingSpec(max_tokens=99, temperature=0.0), (), 1, 0)
    rows = [Row(tokens[:300], 0, [0, 1, 2, 3, 4], draw)]
    found = [cpu.compute(rows)[1]]
    for place in range(300, len(tokens)):
        found.append(cpu.compute([Row([tokens[place]], place, [0, 1, 2, 3, 4, 5], draw)])[1])
    return torch.cat([torch.zeros(299, config.vocab_size), *found])
