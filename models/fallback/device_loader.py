"""Loads a transformers model onto a GPU, and tries it there: by the kernels and in the graphs that will serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cuda.attention import choose_attention, grouped_shapes
from baton.models.cuda.chunks import decodes, lay_out
from baton.models.cuda.limits import check_supported
from baton.models.cuda.queue import Queue
from baton.models.fallback.admission import compare, distance, expect, named_refusals, observe
from baton.models.fallback.device import DeviceFallback
from baton.models.fallback.loader import load_model, log_slower_way
from baton.models.fallback.modules import replace_modules
from baton.models.layers import describe

HEAD_MULTIPLE = 16
"""Elements of a head that the attention kernels take; narrower ones are padded with zeros."""
TRIAL_TOKENS, BLOCK_TOKENS = 150, 64
MOST_REASON = 120
"""Characters of an error in the log."""


def load_on_device(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    load_format: str,
    queue: Queue,
    max_tokens: int,
    max_rows: int,
    trial_tokens: int = TRIAL_TOKENS,
) -> tuple[ModelConfig, DeviceFallback]:
    """The model, once it has passed the trial, with room for steps of up to max_tokens tokens and max_rows rows that
    draw; SettingsError for what cannot be loaded or served. Memory that its steps need is reserved."""
    model = load_model(config, folder, dtype, load_format, queue.device)
    with named_refusals(config):
        config, calls, value_dim = observe(config, model, HEAD_MULTIPLE)
        check_supported(config)
        expected = list(expect(config, model, trial_tokens))  # by the library's own modules
        replaced = replace_modules(model)
        decoder = DeviceFallback(config, model, calls, value_dim, max(max_tokens, 2 * trial_tokens), max_rows)
        trial = DeviceTrial(config, decoder, queue, trial_tokens)
        compare(config, trial, expected)
        reason = trial.why_not_captured(expected[0].tolerance)
    decoder.captured = not reason
    decoder.reserve(max_tokens, queue)
    how = f"each alone: {reason}" if reason else "captured"
    log_slower_way(config, replaced_modules=replaced, launches=how)
    return config, decoder


class DeviceTrial:
    """The Trial of a decoder on a device."""

    block_tokens = BLOCK_TOKENS

    def __init__(self, config: ModelConfig, decoder: DeviceFallback, queue: Queue, tokens: int) -> None:
        self._config, self._decoder, self._queue = config, decoder, queue
        self._width = -(-tokens // BLOCK_TOKENS)
        shape = (2 * self._width, config.num_kv_heads, config.num_layers, 2, BLOCK_TOKENS, config.head_dim)
        pool = PagedPool.of(torch.zeros(shape, dtype=decoder.dtype, device=queue.device))
        decoder.bind_pool(pool)
        shapes = grouped_shapes(describe(config))
        self._attention = choose_attention(config, shapes, [None] * len(shapes), pool, queue, deterministic=False)
        self._plan = split_plan(1, config.num_kv_heads, queue.num_sms)
        self._scratch = DecodeScratch.make(
            1, self._plan.num_chunks, config.num_heads, config.num_kv_heads, config.head_dim, queue.device
        )
        self._inputs = StepInputs.make(1, self._width, queue.device)

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        if decodes(rows[0]):
            self._set_row(rows[0])
            self._decode()
            return self._decoder.last_logits(1).float().cpu()
        arrays = lay_out(rows, BLOCK_TOKENS, self._config.num_heads, self._attention.tile)
        sent = [torch.from_numpy(array).to(self._queue.device) for array in arrays]
        tokens, positions, kv_slots, starts, lengths, tables, work, drawn, *_ = sent
        self._decoder.prefill(tokens, positions, kv_slots, self._attention.over(tables, starts, lengths, work), drawn)
        return self._decoder.last_logits(len(drawn)).float().cpu()

    def _set_row(self, row: Row) -> None:
        """The inputs of `_decode`."""
        inputs, place = self._inputs, row.start
        inputs.tokens.fill_(row.token_ids[0])
        inputs.positions.fill_(place)
        inputs.lengths.fill_(place + 1)
        inputs.kv_slots.fill_(row.blocks[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS)
        inputs.tables.copy_(torch.tensor([list(row.blocks)[: self._width]], dtype=torch.int32))

    def _decode(self) -> None:
        """A step of the row that was set: over fixed memory, as in a graph."""
        share_out(self._inputs.lengths, self._plan, self._scratch.work)
        self._decoder.decode(self._inputs, self._plan, self._scratch, False)

    def why_not_captured(self, tolerance: float) -> str:
        """Why the decode step that ran last cannot be captured; empty: it can, and gives the same logits."""
        self._decode()
        alone = self._decoder.last_logits(1).float().cpu()
        try:
            with no_waiting(self._queue.device):
                self._decode()
            self._decoder.trial_step = replay = self._queue.capture(self._decode)
            self._queue.enqueue(replay)
            self._queue.mark().wait()
        except RuntimeError as error:
            return str(error).splitlines()[0][:MOST_REASON]
        captured = self._decoder.last_logits(1).float().cpu()
        return "" if distance(captured, alone) <= tolerance else "a captured step gives other logits"


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Inside, what waits for the GPU is a RuntimeError: a capture that fails halfway leaves its stream unusable."""
    if not device.startswith("cuda"):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
