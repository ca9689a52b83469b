"""What the GPU keeps for each slot to draw its tokens, and the drawing: temperature and seed, by Gumbel-max."""

from __future__ import annotations

import numpy as np
import torch

from kernels.triton.sampling import SamplingScratch, draw
from kernels.triton.step_inputs import set_entries
from models.batch import Draw
from models.cuda.queue import Queue
from models.cuda.upload import Upload
from models.sampler import GREEDY_BELOW


class SlotSampler:
    """`num_slots` slots and the one of padding behind them; steps of up to max_rows rows that draw."""

    def __init__(self, queue: Queue, num_slots: int, max_rows: int, vocab_size: int) -> None:
        device = queue.device
        self._queue = queue
        self._temperatures = torch.zeros(num_slots + 1, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._row_temperatures = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._row_seeds = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._scratch = SamplingScratch.make(max_rows, vocab_size, device)
        self._upload = Upload(queue, 6 * num_slots)
        self._changed: dict[int, Draw] = {}

    def set_row(self, slot: int, draw: Draw) -> None:
        """From the next `flush` on this slot draws so."""
        self._changed[slot] = draw

    def flush(self) -> None:
        """Enqueue what changed."""
        if not self._changed:
            return
        slots = np.array(list(self._changed), dtype=np.int32)
        params = [draw.sampling for draw in self._changed.values()]
        warmth = [each.temperature if each.temperature >= GREEDY_BELOW else 0.0 for each in params]
        words = np.array([each.seed for each in params], dtype=np.int64).view(np.int32).reshape(-1, 2)
        places, temperatures, halves, values = self._upload.send(
            (
                slots,
                np.array(warmth, dtype=np.float32).view(np.int32),
                np.stack((2 * slots, 2 * slots + 1)),
                words.T.copy(),
            )
        )

        def work() -> None:
            set_entries(self._temperatures.view(torch.int32), places, temperatures)
            set_entries(self._seeds.view(torch.int32), halves, values)

        self._queue.enqueue(work)
        self._changed.clear()

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """out int32 [rows]: the next token of each; logits [rows, V], slots and positions of the new tokens int32."""
        count = len(slots)
        temperatures, seeds = self._row_temperatures[:count], self._row_seeds[:count]
        torch.index_select(self._temperatures, 0, slots, out=temperatures)
        torch.index_select(self._seeds, 0, slots, out=seeds)
        draw(logits, temperatures, seeds, positions, self._scratch, out)
