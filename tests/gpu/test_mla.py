"""Latent attention on a GPU: the checks of its kernels with the shapes of served models, and a runner."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="Triton is made for Linux only")
pytest.importorskip("cuda", reason="CUDA's bindings come with GPU builds of torch")

from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.latent_decode import head_tiles
from baton.kvtransfer.blocks.device_pool import DevicePool
from baton.models.allocation import allocate
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.kv_format import KvFormat
from baton.models.partition import WHOLE
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.kernels import latent_checks as checks
from baton.tests.unit.kernels.kernel_checks import error, randn
from baton.tests.unit.models.conftest import kv_pool
from baton.worker.kv_layout import layout_of

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
LITE, V3 = checks.LITE, checks.V3


@pytest.mark.parametrize(
    ("shape", "query_rank", "partials", "interleaved", "pdl"),
    [(LITE, 0, 0, True, True), (LITE, 0, 2, False, False), (V3, 1536, 0, True, True)],
)
def test_norms_and_rotations(shape, query_rank, partials, interleaved, pdl):
    checks.check_latent_write(GPU, BF16, shape, query_rank, partials, interleaved, pdl)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "pdl"), [(LITE, 64, True), (LITE, 16, False), (LITE, 128, True), (V3, 64, True)]
)
def test_decode(shape, block_tokens, pdl):
    lengths = [1, 63, 64, 700, 0, 333, 1024]
    for plan in (
        DecodePlan(9, 5, chunk_tokens=1024),
        split_plan(7, head_tiles(shape.heads), 132),
        fixed_plan(7, head_tiles(shape.heads), 1024, 132, 64),
    ):
        checks.check_latent_decode(GPU, BF16, shape, lengths, block_tokens, plan, pdl)
    checks.check_latent_decode(GPU, BF16, shape, [3000], block_tokens, split_plan(1, 1, 132), pdl)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "slice_tokens"), [(LITE, 64, 8192), (LITE, 64, 512), (LITE, 16, 512), (V3, 64, 512)]
)
def test_prompts(shape, block_tokens, slice_tokens):
    lengths, new = [1, 300, 1000, 64, 130], [1, 300, 129, 64, 1]
    checks.check_latent_prefill(GPU, BF16, shape, lengths, new, block_tokens, slice_tokens)


def test_bits_depend_on_neither_batch_nor_chunks():
    """Guards against a row whose bits change with what else is in the step: --deterministic rests on this."""
    step = checks.Step.make(GPU, BF16, LITE, [700], 64)
    query = randn((1, LITE.heads, 192), BF16, GPU)
    out = checks.decode(step, LITE, query, fixed_plan(1, 1, 700, 132, 64))
    tables = torch.nn.functional.pad(step.tables, (0, 8)).repeat(40, 1)
    lengths = torch.tensor([1 + 17 * row for row in range(39)] + [700], dtype=torch.int32, device=GPU)
    among = checks.Step(step.pool, tables, lengths, step.kv_up)
    assert torch.equal(checks.decode(among, LITE, query.repeat(40, 1, 1), fixed_plan(40, 1, 700, 132, 64))[39], out[0])
    query = randn((700, LITE.heads, 192), BF16, GPU)
    whole = checks.prefill(step, LITE, query, [700], 8192)
    last = checks.prefill(step, LITE, query[-100:].contiguous(), [100], 512)
    assert torch.equal(whole[-100:], last)


@pytest.fixture
def folder(tmp_path):
    """DeepSeek-V2-Lite with its attention, a layer of experts behind a dense one, and little else."""
    fields = json.loads((SHAPES / "deepseek-v2-lite" / "config.json").read_text())
    fields |= {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    fields |= {"n_routed_experts": 8, "moe_intermediate_size": 128, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    _, places = allocate(ModelConfig.from_folder(tmp_path), False, WHOLE, BF16, "meta")
    chance, tensors = torch.Generator().manual_seed(1), {}
    for name, place in places.items():
        drawn = torch.randn(place.shape, generator=chance) * 0.1
        tensors[name] = (1 + drawn if name.endswith("norm.weight") else drawn).to(BF16)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_the_runner_computes_what_the_cpu_does(folder):
    """Guards the way of latents through the runner: a prompt, a chunk behind it, and rows that decode, by other kernels
    than those of prompts. All experts compute every token, so that no rounding chooses others."""
    table, drawn = list(range(9, 24)), Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    prompt = torch.randint(0, 1000, (800,), generator=torch.Generator().manual_seed(2)).tolist()
    first, then = Row(prompt[:700], 0, table, None), Row(prompt[700:], 700, table, drawn)
    exact, plain = (ModelRunner.load(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    logits = []
    for runner in (exact, plain):
        runner.bind_pool(*kv_pool(runner, 30, 64))
        runner.step([first])
        logits.append(runner.compute([then])[1])
    config = exact.config
    weights = load_weights(config, folder, BF16, "cuda:0", pack=False)
    late = CudaRunner(config, weights, CudaQueue(0), StepLimits(4, 1024), 2048)
    pool = DevicePool(layout_of(config, KvFormat.plain(BF16), 64), 30, 0)
    late.bind_pool(pool.tensor, 2048)
    late.logits([first])
    found = late.logits([then]).float().cpu()
    bound = 2 * error(logits[1], logits[0])
    assert error(found, logits[0]) <= bound
    (token,) = late.launch([then]).read()
    known = [*prompt, *token.token_ids]
    for _ in range(12):
        (entry,) = late.launch([Row(known[-1:], len(known) - 1, table, drawn._replace(num_generated=1), 0)]).read()
        (expected,) = exact.compute([Row(known[-1:], len(known) - 1, table, drawn)])[1]
        known += entry.token_ids
        lost = expected.max() - expected[known[-1]]
        assert float(lost) <= 4 * bound * float(expected.norm()) / len(expected) ** 0.5, "not among the likeliest"
    pool.close()
