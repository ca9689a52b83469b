"""How far quantised weights and a quantised KV cache move a model's predictions, on texts, on this machine's CPU.

Each VARIANT is WEIGHTS/KV: bf16 or a recipe of `--quantization`, and auto or a `--kv-dtype`. With `+inputs` behind fp8,
fp8_block or int8 the inputs of products are in codes too, as a GPU has them where that is fastest. All read the same
texts token by token, each in its own decode steps, so that keys and values are read back as a worker would. Beside the
plain model (bf16/auto, in the dtype of the run): mean and 99th percentile of KL(plain || variant) in nats a token, the
share of tokens where both find the same one most likely, and the mean loss of the text. One JSON line a variant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.kvtransfer.blocks.pool import BlockPool
from baton.models.batch import Draw, Row
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cpu.decoder import DenseDecoder
from baton.models.cpu.runner import DTYPES, ModelRunner
from baton.models.kv_scales import kv_format_of
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.testing.coded_inputs import RUNS, with_coded_inputs
from baton.worker.kv_layout import layout_of

BLOCK_TOKENS = 16
PLAIN = "bf16/auto"
VARIANTS = (
    "int8/auto,int8+inputs/auto,fp8/auto,fp8+inputs/auto,fp8_block/auto,fp8_block+inputs/auto,int4_zeros/auto,int4/auto,"
    "bf16/fp8,fp8/fp8"
)
INPUTS = "+inputs"
CODED = {"fp8": (torch.float8_e4m3fn, None), "fp8_block": (torch.float8_e4m3fn, RUNS), "int8": (torch.int8, None)}
"""Types of the codes of inputs, and how many share a scale."""
SEPARATOR = "<|endoftext|>"
DRAW = Draw(SamplingSpec(max_tokens=1 << 19, temperature=0.0), (), 1, 0)


class Reader:
    """A model that reads texts side by side, a token of each at a time."""

    def __init__(self, folder: Path, variant: str, dtype: str, num_texts: int, length: int) -> None:
        weights, _, kv_dtype = variant.partition("/")
        self._runner = _runner(folder, weights, dtype, kv_dtype or "auto")
        each = -(-length // BLOCK_TOKENS)
        layout = layout_of(self._runner.config, self._runner.kv_format, BLOCK_TOKENS)
        self.pool = BlockPool(layout, num_texts * each)
        self._runner.bind_pool(self.pool.tensor, self.pool.scales)
        self._blocks = [range(index * each, (index + 1) * each) for index in range(num_texts)]

    def log_probs(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """[texts, vocab] behind the texts' tokens number `start`."""
        rows = [
            Row([int(token)], start, blocks, DRAW) for token, blocks in zip(tokens.tolist(), self._blocks, strict=True)
        ]
        step, logits = self._runner.compute(rows)
        return logits.log_softmax(1)[torch.tensor(step.drawn_rows).argsort()]


def _runner(folder: Path, weights: str, dtype: str, kv_dtype: str) -> ModelRunner:
    name, _, inputs = weights.partition(INPUTS)
    quantization = None if name == "bf16" else name
    if INPUTS not in weights:
        return ModelRunner.load(folder, dtype=dtype, kv_dtype=kv_dtype, quantization=quantization)
    if name not in CODED or inputs:
        raise BenchmarkFailed(f"{weights}: inputs are in codes beside {', '.join(CODED)} only")
    config, run_dtype = ModelConfig.from_folder(folder), DTYPES["float32" if dtype == "auto" else dtype]
    plain = load_weights(config, folder, run_dtype, recipe=recipe_for(quantization, config))
    decoder = DenseDecoder(config, with_coded_inputs(plain, *CODED[name]))
    return ModelRunner(config, decoder, run_dtype, kv_format_of(kv_dtype, config, folder, run_dtype))


@dataclass(slots=True)
class Distance:
    """Of a variant from the plain model, token by token."""

    divergences: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    agreed: int = 0

    def take(self, plain: torch.Tensor, other: torch.Tensor, following: torch.Tensor) -> None:
        """Log probabilities [texts, vocab] of both, and the tokens that follow in the texts."""
        self.divergences.append((plain.exp() * (plain - other)).sum(1))
        self.losses.append(-other.gather(1, following[:, None])[:, 0])
        self.agreed += int((plain.argmax(1) == other.argmax(1)).sum())

    def values(self) -> dict[str, float | int]:
        divergence, loss = torch.cat(self.divergences), torch.cat(self.losses)
        return {
            "tokens": len(loss),
            "kl_mean": round(float(divergence.mean()), 6),
            "kl_p99": round(float(divergence.quantile(0.99)), 5),
            "top1_agreement": round(self.agreed / len(loss), 5),
            "loss": round(float(loss.mean()), 4),
        }


def compare(
    folder: Path, variants: Sequence[str], dtype: str, texts: torch.Tensor
) -> Iterator[tuple[str, dict[str, float | int]]]:
    """texts [texts, tokens]. A variant and its Distance.values, the plain model first."""
    count, length = texts.shape
    readers: dict[str, Reader] = {}
    distances = {name: Distance() for name in (PLAIN, *variants)}
    try:
        for name in distances:
            readers[name] = Reader(folder, name, dtype, count, length)
        for start in range(length - 1):
            plain = readers[PLAIN].log_probs(texts[:, start], start)
            for name, reader in readers.items():
                found = plain if name == PLAIN else reader.log_probs(texts[:, start], start)
                distances[name].take(plain, found, texts[:, start + 1])
    finally:
        for reader in readers.values():
            reader.pool.close()
    for name, distance in distances.items():
        yield name, distance.values()


def read_texts(folder: Path, path: Path, most: int, length: int) -> torch.Tensor:
    """int64 [texts, length]: the beginnings of the file's texts that are long enough, up to `most`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = path.read_text(encoding="utf-8").split(SEPARATOR)
    found = [ids[:length] for text in texts if len(ids := tokenizer.encode(text.strip()).ids) >= length]
    if not found:
        raise BenchmarkFailed(f"{path}: no text has {length} tokens (texts are separated by {SEPARATOR})")
    return torch.tensor(found[:most])


def main(argv: Sequence[str]) -> int:
    parser = new_parser("quality", __doc__)
    parser.add_argument("texts", type=Path, metavar="FILE", help=f"texts, with {SEPARATOR} between them")
    parser.add_argument("--model", default="demo", help="a folder of plain weights, a hub id, or 'demo'")
    parser.add_argument("--variants", default=VARIANTS, help="WEIGHTS/KV, comma separated")
    parser.add_argument("--dtype", default="auto", help="of the run: auto (float32) or bfloat16")
    parser.add_argument("--num-texts", type=int, default=64, help="most texts")
    parser.add_argument("--length", type=int, default=256, help="tokens of each text; shorter ones are left out")
    options = parser.parse_args(argv)
    lines, folder = JsonLines(options.output), locate_model(options.model)
    texts = read_texts(folder, options.texts, options.num_texts, options.length)
    for name, values in compare(folder, options.variants.split(","), options.dtype, texts):
        lines.put("quality", model=folder.name, variant=name, dtype=options.dtype, texts=len(texts), **values)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
