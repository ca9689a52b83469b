"""What adapters add to a product: y[row] += B (A x[row]), each row with the matrices of its own adapter.

A bank has slots; one slot holds one adapter: for each product (site) A [parts * rank, K], then B [N, rank], packed by
the adapter's own rank (a multiple of RANK_STEP), so that no byte of a lower rank's padding is read. `shrink` makes
t = A x of items of rows (adapter_rows), float32 sums of fixed parts of K, which their readers add in order: no atomics.
`expand` adds B t to a product in place, or makes it in memory of its own before the product, which then adds it
(`linear`); t is rounded to the bank's dtype before. Few programs go through the items in turn, so that a step of few
adapters launches no more than one of many.
A row's bits depend on neither its neighbours nor their number. Bytes: A and B of each adapter in the step, once.

Early launches, `beside`: shrink lets the launch behind it begin once its own wait for x is over. So x is there when
expand and then the product begin, and the product waits only before it adds: it runs beside both.
    x -> shrink -> expand -.
    x -> product ----------+-> adds
Products by cuBLAS, and of quantised weights, cannot wait so late: expand adds to them in place, behind them. Without
`beside`, as of quantised weights, each launch waits for the one before.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.adapter_rows import COLUMNS, ITEM_ROWS, AdapterRows
from baton.kernels.triton.launch import cdiv, launch_options, require

RANK_STEP = 16
SPLIT_ROWS = 2048
"""Up to so many rows, K is split."""
AHEAD_ROWS, AHEAD_INPUTS, MOST_AHEAD = 8, 512, 32
"""Up to so many rows, K is split into parts of so many inputs, if they are no more than the last: a program has its
part of A in registers before x is there."""
FEW_ROWS = 256
SHRINK_ITEMS, EXPAND_ITEMS = 32, 64
"""Programs that go through the items of FEW_ROWS rows or fewer, for each part of A and each tile of B."""
HEAD_ITEMS = 8
"""The same of a product whose tiles alone occupy the GPU: with the vocabulary."""
MORE_ITEMS = 8
"""So many times as many programs go through the items of more rows."""
EXPAND_BYTES = 1 << 14
"""Of a tile of B, if that is more than 128 outputs."""
MOST_TILES = 512
"""Of outputs that are whole tiles; more, as a vocabulary may need, are the largest tiles, of which the last is less."""
MOST_PARTS = 3
"""Products of a site that read the same x and were put together: query, key and value."""


class BankSite(NamedTuple):
    """One product of one layer, and where its matrices lie in a slot, in elements for each unit of rank."""

    number: int
    a_offset: int
    b_offset: int
    inputs: int
    ends: tuple[int, ...]
    """Where the outputs of each part end; the last is N."""
    first_output: int = 0
    """Among the outputs of all products."""


@dataclass(frozen=True, slots=True)
class AdapterBank:
    """The matrices of S adapters."""

    numbers: torch.Tensor  # [S, elements of a slot]
    ranks: torch.Tensor  # int32 [S, sites]; 0: the adapter leaves the product alone
    max_rank: int
    scales: torch.Tensor | None = None  # float32 [S, outputs of all products], of W x; None: adapters scale none

    def scales_of(self, site: BankSite) -> torch.Tensor | None:
        """Of one product, float32 [S, N]."""
        if self.scales is None:
            return None
        return self.scales[:, site.first_output : site.first_output + site.ends[-1]]

    def rank_width(self, site: BankSite) -> int:
        """Numbers of t of a row."""
        return len(site.ends) * self.max_rank


@dataclass(frozen=True, slots=True)
class AddedRows:
    """What a product adds to its rows."""

    values: torch.Tensor  # [M, N]
    adapters: torch.Tensor  # int32 [M]: below 0, the row's values are not defined and nothing is added
    scales: torch.Tensor | None = None  # float32 [S, N], by adapters: of the row's product alone


@dataclass(frozen=True, slots=True)
class AddedProduct:
    """B t of M rows, to be added to their product."""

    bank: AdapterBank
    site: BankSite
    rows: AdapterRows
    hidden: torch.Tensor  # float32 [splits, M, parts * max_rank]: t; what no item computes is not defined
    memory: torch.Tensor  # of the bank's dtype, for `apart`
    beside: bool = False
    """Whether what is launched behind begins once x is there."""

    @property
    def fits_apart(self) -> bool:
        return len(self.rows.adapters) * self.site.ends[-1] <= len(self.memory)

    def apart(self, *, pdl: bool) -> AddedRows:
        """Launches B t into the memory, where a product reads it. pdl: it is made beside."""
        require(self.beside or not pdl, "what is added is not made beside its product")
        shape = len(self.rows.adapters), self.site.ends[-1]
        values = self.memory[: shape[0] * shape[1]].view(shape)
        expand(self, values, add=False, pdl=pdl)
        return AddedRows(values, self.rows.adapters, self.bank.scales_of(self.site))


def splits_of(num_inputs: int, num_rows: int, *, deterministic: bool) -> int:
    """Parts of K: so many that few rows occupy the GPU, and if deterministic the same for all numbers of rows."""
    if num_rows > SPLIT_ROWS and not deterministic:
        return 1
    if is_ahead(num_inputs, num_rows, deterministic=deterministic):
        return num_inputs // AHEAD_INPUTS
    wanted = 16 if num_inputs > 8192 else 8
    return next(count for count in (wanted, 8, 4, 2, 1) if num_inputs % (count * RANK_STEP) == 0 or count == 1)


def is_ahead(num_inputs: int, num_rows: int, *, deterministic: bool) -> bool:
    """Whether A is read before x is there."""
    fits = num_inputs % AHEAD_INPUTS == 0 and num_inputs // AHEAD_INPUTS <= MOST_AHEAD
    return fits and num_rows <= AHEAD_ROWS and not deterministic


@triton.jit
def prefetch_rows(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """Asks the L2 cache for ROWS x COLUMNS elements, UNIT of them an instruction."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // UNIT)[None, :]
    address = (ptr + row * stride + column * UNIT).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_item(
    items_ptr, order_ptr, ranks_ptr, number, num_items, site, SITES: tl.constexpr, ITEM_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Slot, rank and rows of an item, and which of the rows there are; past the last: rank 0 and no row."""
    item = items_ptr + number * COLUMNS
    slot = tl.load(item, mask=number < num_items, other=0)
    first = tl.load(item + 1, mask=number < num_items, other=0)
    there = tl.arange(0, ITEM_ROWS) < tl.load(item + 2, mask=number < num_items, other=0)
    rank = tl.load(ranks_ptr + slot * SITES + site, mask=number < num_items, other=0)
    row = tl.load(order_ptr + first + tl.arange(0, ITEM_ROWS), mask=there, other=0)
    return slot.to(tl.int64), tl.multiple_of(rank, 16), row, there


@triton.jit
def _load_a(
    numbers_ptr, slot, rank, a_offset, part, first_r, split, SLOT_SIZE: tl.constexpr, K: tl.constexpr,
    SHARE: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """Some rows of a part of A for a part of K; zeros for a lower rank."""
    r = tl.arange(0, RANK_STEP)[:, None]
    matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
    place = matrix + (part * rank + first_r + r) * K + split * SHARE + tl.arange(0, SHARE)[None, :]
    return tl.load(place, mask=first_r + r < rank, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "site", "a_offset"])
def _shrink_ranks_kernel(
    x_ptr, numbers_ptr, ranks_ptr, order_ptr, items_ptr, hidden_ptr, num_rows, site, a_offset,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, MAX_RANK: tl.constexpr,
    WIDTH: tl.constexpr, TILE_K: tl.constexpr, ITEM_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK_STEP: tl.constexpr, PREFETCH: tl.constexpr, AHEAD: tl.constexpr, BESIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Items, ranks and matrices were written before the chain of early launches began. AHEAD: each has one item."""
    first_item = tl.program_id(0)
    block = tl.program_id(1)
    split = tl.program_id(2)
    part = block // (MAX_RANK // RANK_STEP)
    first_r = block % (MAX_RANK // RANK_STEP) * RANK_STEP
    SHARE: tl.constexpr = K // SPLITS
    num_items = tl.load(items_ptr + 3)
    if PDL and not BESIDE:
        gdc_launch_dependents()
    slot, rank, row, there = load_item(
        items_ptr, order_ptr, ranks_ptr, first_item, num_items, site, SITES, ITEM_ROWS, COLUMNS
    )
    if AHEAD:
        a = _load_a(numbers_ptr, slot, rank, a_offset, part, first_r, split, SLOT_SIZE, K, SHARE, RANK_STEP)
    if PDL:
        if PREFETCH:  # noqa: SIM102 - known when compiling, the next one is not
            if first_r < rank:
                matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
                prefetch_rows(matrix + (part * rank + first_r) * K + split * SHARE, K, RANK_STEP, PREFETCH, 64)
        if BESIDE:
            if (first_item < num_items) | (first_item + block + split == 0):  # one always, so that x is there
                gdc_wait()
                gdc_launch_dependents()
        else:
            gdc_wait()
    r = tl.arange(0, RANK_STEP)
    column = tl.arange(0, TILE_K)
    for number in tl.range(first_item, num_items, tl.num_programs(0), num_stages=1):
        if first_r < rank:
            x_place = x_ptr + row.to(tl.int64)[:, None] * K + split * SHARE + column[None, :]
            total = tl.zeros([RANK_STEP, ITEM_ROWS], tl.float32)
            if AHEAD:
                x = tl.load(x_place, mask=there[:, None], other=0.0)
                total = tl.dot(a, x.T, total, input_precision="ieee")
            else:
                matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
                a_place = matrix + (part * rank + first_r + r[:, None]) * K + split * SHARE + column[None, :]
                for k in tl.range(0, SHARE, TILE_K):
                    x = tl.load(x_place + k, mask=there[:, None], other=0.0)
                    total = tl.dot(tl.load(a_place + k), x.T, total, input_precision="ieee")
            target = hidden_ptr + (split * num_rows + row).to(tl.int64)[None, :] * WIDTH
            tl.store(target + part * MAX_RANK + first_r + r[:, None], total, mask=there[None, :])
        following = number + tl.num_programs(0)
        slot, rank, row, there = load_item(
            items_ptr, order_ptr, ranks_ptr, following, num_items, site, SITES, ITEM_ROWS, COLUMNS
        )


def shrink(
    x: torch.Tensor,
    bank: AdapterBank,
    site: BankSite,
    rows: AdapterRows,
    hidden: torch.Tensor,
    memory: torch.Tensor,
    *,
    ahead: bool = False,
    beside: bool = False,
    pdl: bool = False,
) -> AddedProduct:
    """Fills hidden float32 [splits, M, parts * max_rank]; x [M, K]; memory and beside: see AddedProduct. ahead: of few
    rows, whose splits are of AHEAD_INPUTS."""
    num_rows, k = x.shape
    splits, width = hidden.shape[0], bank.rank_width(site)
    require(k == site.inputs and k % (splits * RANK_STEP) == 0, f"{k} inputs in {splits} parts, a site of {site}")
    require(tuple(hidden.shape) == (splits, num_rows, width) and hidden.dtype == torch.float32, "hidden does not fit")
    require(len(rows.adapters) == num_rows, f"{num_rows} rows, {len(rows.adapters)} were grouped")
    require(len(site.ends) <= MOST_PARTS, f"a product of {len(site.ends)} parts")
    _check(bank, x, hidden)
    share = k // splits
    tile_k = next(size for size in (256, 128, 64, 32, 16) if share % size == 0)
    prefetch = next((size for size in (1024, 512, 256) if share >= size), 0) if x.element_size() == 2 else 0
    require(not ahead or (share == AHEAD_INPUTS and num_rows <= AHEAD_ROWS), f"{num_rows} rows in parts of {share}")
    if ahead:
        tile_k, prefetch = share, 0
    if len(rows.items):
        _shrink_ranks_kernel[(_programs(rows, SHRINK_ITEMS), width // RANK_STEP, splits)](
            x, bank.numbers, bank.ranks, rows.order, rows.items, hidden, num_rows, site.number, site.a_offset,
            SLOT_SIZE=bank.numbers.shape[1], SITES=bank.ranks.shape[1], K=k, SPLITS=splits, MAX_RANK=bank.max_rank,
            WIDTH=width, TILE_K=tile_k, ITEM_ROWS=ITEM_ROWS, COLUMNS=COLUMNS, RANK_STEP=RANK_STEP, PREFETCH=prefetch,
            AHEAD=ahead, BESIDE=beside, PDL=pdl, **launch_options(4, pdl, 3),
        )  # fmt: skip
    return AddedProduct(bank, site, rows, hidden, memory, beside)


@triton.jit
def part_of(n, END0: tl.constexpr, END1: tl.constexpr):
    """Of an output, or of a tile that lies in one part."""
    return (n >= END0).to(tl.int32) + (n >= END1).to(tl.int32)


@triton.jit
def load_hidden(
    hidden_ptr, row, there, num_rows, part, PARTS: tl.constexpr, WIDTH: tl.constexpr, MAX_RANK: tl.constexpr
):
    """t of some rows, float32 [rows, MAX_RANK]: the parts of K in order."""
    r = tl.arange(0, MAX_RANK)
    place = row.to(tl.int64)[:, None] * WIDTH + part * MAX_RANK + r[None, :]
    total = tl.load(hidden_ptr + place, mask=there[:, None], other=0.0)
    for number in tl.static_range(1, PARTS):
        total += tl.load(hidden_ptr + number * num_rows * WIDTH + place, mask=there[:, None], other=0.0)
    return total


@triton.jit
def _load_b(matrix, n, r, rank, N: tl.constexpr, EVEN: tl.constexpr):
    """Rows n of B; EVEN: there are no others."""
    inside = (r < rank)[None, :] if EVEN else (r < rank)[None, :] & (n < N)[:, None]
    return tl.load(matrix + n[:, None] * rank + r[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "site", "b_offset"])
def _expand_ranks_kernel(
    hidden_ptr, numbers_ptr, ranks_ptr, order_ptr, items_ptr, out_ptr, num_rows, site, b_offset,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, END0: tl.constexpr,
    END1: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, MAX_RANK: tl.constexpr, TILE_N: tl.constexpr,
    ITEM_ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr, BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL and BESIDE:
        gdc_launch_dependents()
    first_item = tl.program_id(0)
    first_n = tl.program_id(1) * TILE_N
    num_items = tl.load(items_ptr + 3)
    n = first_n + tl.arange(0, TILE_N)
    r = tl.arange(0, MAX_RANK)
    part = part_of(first_n, END0, END1)
    slot, rank, row, there = load_item(
        items_ptr, order_ptr, ranks_ptr, first_item, num_items, site, SITES, ITEM_ROWS, COLUMNS
    )
    matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
    b = _load_b(matrix, n, r, rank, N, EVEN)
    if PDL:
        if BESIDE:
            if (first_item < num_items) | (first_item + first_n == 0):
                gdc_wait()
        else:
            gdc_launch_dependents()
            gdc_wait()
    for number in tl.range(first_item, num_items, tl.num_programs(0), num_stages=1):
        hidden = load_hidden(hidden_ptr, row, there, num_rows, part, PARTS, WIDTH, MAX_RANK)
        hidden = tl.where((r < rank)[None, :], hidden, 0.0).to(b.dtype)
        target = out_ptr + row.to(tl.int64)[None, :] * STRIDE + n[:, None]
        inside = there[None, :] if EVEN else there[None, :] & (n < N)[:, None]
        total = tl.zeros([TILE_N, ITEM_ROWS], tl.float32)
        if ADD:
            total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        total = tl.dot(b, hidden.T, total, input_precision="ieee")
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)
        following = number + tl.num_programs(0)
        slot, rank, row, there = load_item(
            items_ptr, order_ptr, ranks_ptr, following, num_items, site, SITES, ITEM_ROWS, COLUMNS
        )
        matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
        b = _load_b(matrix, n, r, rank, N, EVEN)


def expand(
    added: AddedProduct,
    out: torch.Tensor,
    *,
    add: bool = True,
    few_programs: int = EXPAND_ITEMS,
    pdl: bool = False,
) -> None:
    """Adds B t to out [M, N] in place, or to the first of parts [S, M, N] of a product; without `add` it becomes out,
    where rows have an adapter. Rows of out may lie apart. few_programs: that go through the items of few rows."""
    whole = out[0] if out.dim() == 3 else out
    num_rows, n = whole.shape
    bank, site, rows = added.bank, added.site, added.rows
    splits, width = added.hidden.shape[0], bank.rank_width(site)
    require(tuple(added.hidden.shape) == (splits, num_rows, width), f"t {tuple(added.hidden.shape)} of other rows")
    require(n == site.ends[-1], f"{n} outputs, a site of {site.ends[-1]}")
    require(whole.stride(1) == 1, "a row of out lies apart")
    _check(bank, added.hidden)
    most = max(128, EXPAND_BYTES // (bank.max_rank * bank.numbers.element_size()))
    sizes = [size for size in (512, 256, 128, 64, 32, 16) if size <= most]
    tile_n = next((size for size in sizes if all(end % size == 0 for end in site.ends)), 0)
    if len(site.ends) == 1 and n > MOST_TILES * tile_n:
        tile_n = sizes[0]
    require(tile_n > 0, f"parts that end at {site.ends} are no multiples of 16")
    if len(rows.items):
        _expand_ranks_kernel[(_programs(rows, few_programs), cdiv(n, tile_n))](
            added.hidden, bank.numbers, bank.ranks, rows.order, rows.items, whole, num_rows, site.number, site.b_offset,
            SLOT_SIZE=bank.numbers.shape[1], SITES=bank.ranks.shape[1], N=n, STRIDE=whole.stride(0), **ends(site),
            PARTS=splits, WIDTH=width, MAX_RANK=bank.max_rank, TILE_N=tile_n, ITEM_ROWS=ITEM_ROWS, COLUMNS=COLUMNS,
            EVEN=n % tile_n == 0, ADD=add, BESIDE=added.beside, PDL=pdl, **launch_options(4, pdl),
        )  # fmt: skip


def ends(site: BankSite) -> dict[str, int]:
    """Where the first and the second part end; N where there is none behind."""
    n = site.ends[-1]
    first, second = (*site.ends[:-1], n, n)[:2]
    return {"END0": first, "END1": second}


def _programs(rows: AdapterRows, of_few: int) -> int:
    """That go through the items."""
    return min(len(rows.items), of_few if len(rows.order) <= FEW_ROWS else MORE_ITEMS * of_few)


def _check(bank: AdapterBank, *tensors: torch.Tensor) -> None:
    require(bank.max_rank >= RANK_STEP and bank.max_rank & (bank.max_rank - 1) == 0, f"a rank of {bank.max_rank}")
    require(
        bank.ranks.dtype == torch.int32 and len(bank.ranks) == len(bank.numbers), "a rank a slot and site is needed"
    )
    for tensor in (bank.numbers, bank.ranks, *tensors):
        require(tensor.is_contiguous(), "tensors must be contiguous")
