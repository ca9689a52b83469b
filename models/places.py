"""Where the tensors of a checkpoint go: which rows and columns a rank reads of each, and how they are laid down.

A weight may be quantised in the files and plain on the device (`PlainPlace`), or quantised on both (`ScaledPlace`,
`GroupedPlace`; baton.kernels.linear says what lies there). Names of tensors are the part of models.weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

import torch

from baton.kernels.linear.grouped import MIDDLE, pack_codes
from baton.models.quantization.weight import QuantizedWeight

Stored: TypeAlias = "torch.Tensor | QuantizedWeight"
"""A weight as the files have it."""


class WeightCut(NamedTuple):
    """What a rank reads of the rows, or of the columns, of a tensor in a checkpoint."""

    total: int
    part: range

    @classmethod
    def whole(cls, total: int) -> WeightCut:
        return cls(total, range(total))

    @property
    def slice(self) -> slice:
        return slice(self.part.start, self.part.stop)

    def times(self, width: int) -> WeightCut:
        """The same of things that are `width` rows each."""
        return WeightCut(self.total * width, range(self.part.start * width, self.part.stop * width))

    def within(self, window: range) -> WeightCut:
        """The same in a tensor that has these rows alone."""
        return WeightCut(len(window), range(self.part.start - window.start, self.part.stop - window.start))

    def after(self, skipped: int, total: int) -> WeightCut:
        """The same in a tensor of `total` rows that has these behind `skipped` others."""
        return WeightCut(total, range(skipped + self.part.start, skipped + self.part.stop))


class WeightPlace(Protocol):
    """Where a tensor of a checkpoint goes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight in the checkpoint, before it is cut."""
        ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def fill(self, stored: Stored) -> None:
        """Takes this rank's part of it."""
        ...


@dataclass(frozen=True, slots=True)
class PlainPlace:
    """Plain numbers, whatever the files have."""

    target: torch.Tensor
    """Broadcast to, where it has more dimensions."""
    cuts: tuple[WeightCut, ...]
    """What is read, for each of the dimensions in the checkpoint."""
    offset: float = 0.0
    """Added to the numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(cut.total for cut in self.cuts)

    @property
    def size_bytes(self) -> int:
        return self.target.nbytes

    @property
    def device(self) -> torch.device:
        return self.target.device

    def within(self, outputs: range, inputs: range) -> PlainPlace:
        """The same of a weight of which only these rows and columns are there."""
        rows, columns = self.cuts
        return replace(self, cuts=(rows.within(outputs), columns.within(inputs)))

    def fill(self, stored: Stored) -> None:
        if isinstance(stored, QuantizedWeight):
            stored.dequantise(self.target, *(cut.part for cut in self.cuts))
        else:
            self.target.copy_(stored[tuple(cut.slice for cut in self.cuts)])
        if self.offset:
            self.target.add_(self.offset)


@dataclass(frozen=True, slots=True)
class JoinedPlaces:
    """Of a tensor of which several ranges of rows are read, each to a place of its own."""

    places: tuple[WeightPlace, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places[0].shape

    @property
    def size_bytes(self) -> int:
        return sum(place.size_bytes for place in self.places)

    @property
    def device(self) -> torch.device:
        return self.places[0].device

    def fill(self, stored: Stored) -> None:
        for place in self.places:
            place.fill(stored)


@dataclass(frozen=True, slots=True)
class StackedPlace:
    """Of a tensor that has all experts of a layer: [experts, inputs, outputs], or of biases [experts, outputs]."""

    target: torch.Tensor  # [experts of this rank, outputs, inputs], or [experts of this rank, outputs]
    experts: WeightCut
    interleaved: bool
    """The outputs of gate and up take turns in the checkpoint; in memory those of up follow those of gate."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.experts.total, *reversed(self.target.shape[1:])

    @property
    def size_bytes(self) -> int:
        return self.target.nbytes

    @property
    def device(self) -> torch.device:
        return self.target.device

    def fill(self, stored: Stored) -> None:
        for target, expert in zip(self.target, self.experts.part, strict=True):
            if isinstance(stored, QuantizedWeight):  # the outputs of all experts behind one another
                outputs, inputs = target.shape
                rows = torch.empty_like(target)
                stored.dequantise(rows, range(expert * outputs, (expert + 1) * outputs), range(inputs))
            else:
                rows = stored[expert].t()
            target.copy_(torch.cat((rows[0::2], rows[1::2])) if self.interleaved else rows)


@dataclass(frozen=True, slots=True)
class ScaledPlace:
    """Rows of a ScaledLinear."""

    codes: torch.Tensor  # [rows, K]
    scales: torch.Tensor  # [rows of scales, columns of scales]
    outputs_per_scale: int
    outputs: WeightCut
    inputs: WeightCut

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs.total, self.inputs.total

    @property
    def size_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def cuts(self) -> tuple[WeightCut, ...]:
        return self.outputs, self.inputs

    def within(self, outputs: range, inputs: range) -> ScaledPlace:
        """As of PlainPlace."""
        return replace(self, outputs=self.outputs.within(outputs), inputs=self.inputs.within(inputs))

    def fill(self, stored: Stored) -> None:
        assert isinstance(stored, QuantizedWeight), "the place was made for what the files have"
        self.codes.copy_(stored.codes[self.outputs.slice, self.inputs.slice])
        firsts = torch.arange(
            self.outputs.part.start, self.outputs.part.stop, self.outputs_per_scale, device=self.device
        )
        first_column = self.inputs.part.start // stored.inputs_per_scale
        columns = slice(first_column, first_column + self.scales.shape[1])
        self.scales.copy_(stored.scales[firsts // stored.outputs_per_scale, columns])


@dataclass(frozen=True, slots=True)
class GroupedPlace:
    """Rows of a GroupedLinear."""

    words: torch.Tensor  # [rows, K / 4]
    scales: torch.Tensor  # [G, rows]
    zeros: torch.Tensor | None  # [G, rows]
    order: torch.Tensor | None  # [K], of all inputs
    block: int
    inputs_per_scale: int
    outputs: WeightCut
    inputs: WeightCut

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs.total, self.inputs.total

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in (self.words, self.scales, self.zeros) if part is not None)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def cuts(self) -> tuple[WeightCut, ...]:
        return self.outputs, self.inputs

    def within(self, outputs: range, inputs: range) -> GroupedPlace:
        """As of PlainPlace."""
        return replace(self, outputs=self.outputs.within(outputs), inputs=self.inputs.within(inputs))

    def fill(self, stored: Stored) -> None:
        assert isinstance(stored, QuantizedWeight), "the place was made for what the files have"
        codes = stored.codes[self.outputs.slice, self.inputs.slice]
        shift = MIDDLE if codes.dtype == torch.int8 else 0
        codes = (codes + shift).view(torch.uint8)
        if self.order is not None:
            codes = codes[:, self.order.long()]
        pack_codes(codes, self.block, self.words)
        self.scales.copy_(self._of_groups(stored.scales, stored.inputs_per_scale))
        if self.zeros is not None:
            if stored.zeros is None:
                self.zeros.fill_(MIDDLE)
            else:
                self.zeros.copy_(self._of_groups(stored.zeros + shift, stored.inputs_per_scale))

    def _of_groups(self, stored: torch.Tensor, inputs_per_scale: int) -> torch.Tensor:
        """[groups, rows] of this rank, whose groups may be narrower than those of the files."""
        spread = stored[self.outputs.slice].repeat_interleave(inputs_per_scale // self.inputs_per_scale, 1)
        first = self.inputs.part.start // self.inputs_per_scale
        return spread[:, first : first + self.scales.shape[0]].t()
