"""KV of 8-bit floats on a GPU: kernels with the shapes of served models, and a runner that finds it computed, moved or
cached."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")
pytest.importorskip("cuda", reason="CUDA's bindings come with GPU builds of torch")

from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.prefill_attention import block_m
from baton.kvtransfer.blocks.device_pool import DevicePool
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.kv_format import KvFormat
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.tests.unit.kernels import kernel_checks as checks
from baton.tests.unit.models.conftest import Sequences
from baton.worker.kv_layout import layout_of

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
LLAMA_8B, QWEN_05B = checks.Heads(32, 8, 128), checks.Heads(14, 2, 64)
GREEDY = Draw(SamplingSpec(max_tokens=1000, temperature=0.0), (), 0, 0)
LONGEST = 640


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(32, 32, 96)])
@pytest.mark.parametrize("scales", ["token", "static"])
def test_write(heads, scales, pdl):
    checks.check_quantised_write(GPU, BF16, heads, 500, 64, scales, pdl)
    checks.check_quantised_write(GPU, BF16, heads, 33, 16, scales, pdl)


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(32, 8, 96), checks.Heads(16, 1, 256)])
@pytest.mark.parametrize("scales", ["token", "static"])
def test_decode_attention(heads, block_tokens, scales):
    """Guards the bytes of words as the GPU's own instructions take them apart."""
    lengths = [1, 63, 64, 700, 333, 1024]
    for plan in (
        DecodePlan(9, 5, chunk_tokens=1024),
        DecodePlan(70, 5, splits=9),
        split_plan(6, heads.key, 132, 4),
        fixed_plan(6, heads.key, 1024, 132, 64),
    ):
        checks.check_decode_attention(GPU, BF16, heads, lengths, block_tokens, plan, None, True, scales)
    checks.check_decode_attention(GPU, BF16, heads, lengths, block_tokens, plan, 100, False, scales)


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(16, 1, 256)])
@pytest.mark.parametrize("scales", ["token", "static"])
def test_prefill_attention(heads, block_tokens, scales):
    ragged = [(300, 0), (1, 513), (129, 700), (64, 64)]
    for window in (None, 100):
        checks.check_prefill_attention(
            GPU, BF16, heads, ragged, block_tokens, block_m(heads.dim), window, scales=scales
        )
    checks.check_chunks_do_not_matter(GPU, BF16, heads, block_tokens, block_m(heads.dim), scales)


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, checks.Heads(16, 1, 256)])
@pytest.mark.parametrize("scales", ["token", "static"])
def test_widened_context(heads, block_tokens, scales):
    checks.check_widened_context(GPU, BF16, heads, [300, 0, 1, 4000, 64], block_tokens, scales)


class Served:
    """A runner over a pool as a worker has it: two layers of an 8B model, or the demo model."""

    def __init__(self, kv_format: KvFormat, dtype: torch.dtype = BF16, **limits: object) -> None:
        folder = locate_model("demo") if dtype == torch.float32 else SHAPES / "llama-3.1-8b"
        config = ModelConfig.from_folder(folder)
        config = config if dtype == torch.float32 else replace(config, num_layers=2, windowed_layers=(False, False))
        load_format = "auto" if dtype == torch.float32 else "dummy"
        weights = load_weights(config, folder, dtype, "cuda:0", load_format, pack=False)
        self.runner = CudaRunner(
            config, weights, CudaQueue(0), StepLimits(8, 1024, **limits), LONGEST, kv_format=kv_format
        )
        self.pool = DevicePool(layout_of(config, kv_format, 64), 64, 0)
        self.runner.bind_pool(self.pool.tensor, LONGEST, scales=self.pool.scales)

    def move(self, source: list[int], target: list[int]) -> None:
        torch.cuda.synchronize()
        self.pool.memory.data[target] = self.pool.memory.data[source]
        torch.cuda.synchronize()


@pytest.fixture(params=["fp8", "fp8_static"])
def served(request):
    static = torch.full((2, 2, 8), 0.05) if request.param == "fp8_static" else None
    served = Served(KvFormat.fp8(static))
    yield served
    served.pool.close()


def test_computed_moved_and_cached_kv_give_the_same_bits(served):
    """Guards the promise of exactness: attention reads what is in the pool, however it came there."""
    prompt = torch.randint(0, 100_000, (320,), generator=torch.Generator().manual_seed(1)).tolist()
    local, moved = list(range(10)), list(range(20, 30))
    served.runner.logits([Row(prompt[:256], 0, local, None)])
    served.move(local[:4], moved[:4])
    assert served.pool.digests([local[:4]]) == served.pool.digests([moved[:4]])
    first = served.runner.logits([Row(prompt[256:], 256, local, GREEDY)]).clone()
    cached = served.runner.logits([Row(prompt[256:], 256, moved, GREEDY)]).clone()
    assert torch.equal(first, cached) and bool(first.isfinite().all())
    assert served.pool.digests([local[:5]]) == served.pool.digests([moved[:5]])


def test_a_decode_step_reads_moved_kv_as_its_own(served):
    """Guards the decode kernel the same way: log probabilities of the row that computed, and of the other."""
    prompt = torch.randint(0, 100_000, (320,), generator=torch.Generator().manual_seed(2)).tolist()
    local, moved = list(range(10)), list(range(20, 30))
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0, logprobs=True, top_logprobs=3), (), 0, 0)
    (drawn,) = served.runner.launch([Row(prompt, 0, local, draw, 0)]).read()
    served.move(local[:5], moved[:5])
    assert drawn is not None
    later = draw._replace(num_generated=1)
    rows = [Row(drawn.token_ids, 320, blocks, later, slot) for slot, blocks in enumerate((local, moved))]
    one, other = served.runner.launch(rows).read()
    assert one is not None and other is not None
    assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
    assert served.pool.digests([[local[5]]]) == served.pool.digests([[moved[5]]])


def test_tokens_equal_the_cpu_s():
    """Guards the formula: in float32 the GPU and the CPU store the same numbers but for those between two steps."""
    served, folder = Served(KvFormat.fp8(), torch.float32), locate_model("demo")
    plain = Sequences(ModelRunner.load(folder, kv_dtype="fp8"), 1, 300)
    prompt = torch.randint(2, 4000, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    logits = served.runner.logits([Row(prompt, 0, list(range(10)), GREEDY)]).float().cpu()
    _, expected = plain.greedy(0, prompt, 1)
    assert (logits - expected).norm() < 0.02 * expected.norm()
    served.pool.close()
