"""Every kernel compiles for an H100 or H200 here, where there is none: registers, spills and matrix instructions.

Compiling takes a minute of a core; the time limit is for a machine that is busy with other things too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.linear_policy import FASTEST
from baton.tests.unit.kernels.compile_sm90 import CASES

pytestmark = pytest.mark.timeout(1800)
PROCESSES = 2
"""More would mostly import torch and triton."""
MOST_SHARED_BYTES = 232448
"""That a program may have on an H100 or H200; a launch with more is refused."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, list[dict]]:
    """What compile_sm90.py found, by case, in two processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # for debuggers: the instructions are the same
    command = [sys.executable, str(Path(__file__).with_name("compile_sm90.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    shares = [list(CASES)[first::PROCESSES] for first in range(PROCESSES)]
    processes = [subprocess.Popen([*command, *share], env=environment, **pipes) for share in shares]
    found: dict[str, list[dict]] = {case: [] for case in CASES}
    try:
        for process in processes:
            out, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
            for kernel in map(json.loads, out.splitlines()):
                found[kernel["case"]].append(kernel)
    finally:
        for process in processes:
            process.kill()
    return found


def test_no_kernel_spills(kernels):
    """Guards against a tile too large for the registers: it still gives right results, at a fraction of the speed."""
    for case, kernel in ((case, kernel) for case, of_case in kernels.items() for kernel in of_case):
        # Gluon: setmaxnreg gives its groups 240, but ptxas plans the entry with 168. Latents of 64 heads: one register;
        # of 8-bit floats two, outside the loop.
        if case.startswith(("gluon", "latent_128", "fp8_decode")):
            assert kernel["stack_bytes"] <= 16, (case, kernel)
        elif not case.startswith("float32"):  # exact products have no matrix instruction, and are slow in any case
            assert kernel["stack_bytes"] == 0, (case, kernel)


def test_no_two_threads_wait_for_one_word(kernels):
    """Guards against threads with copies of an element, each of which sees another rank's word come at a time of its
    own: a sum of old words, and a loop that not all threads leave together."""
    waiting = [each for case in ("ranks_2", "ranks_8") for each in kernels[case]]
    assert not any(each["awaited_twice"] for each in waiting), waiting


def test_every_kernel_fits_in_shared_memory(kernels):
    """Guards against a ring of too many stages: it compiles, and is refused at its first launch on a GPU."""
    large = [each for of_case in kernels.values() for each in of_case if each["shared_bytes"] > MOST_SHARED_BYTES]
    assert not large, large


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("small", 5),
        ("keys_and_values", 2),
        ("blocks", 8),
        ("sampling", 4),
        ("ranks_2", 6),
        ("step_inputs", 2),
        ("drafts", 4),
        ("entries", 4),
        ("dequantise", 4),
    ],
)
def test_small_kernels_leave_room(kernels, case, count):
    """Guards against a row kernel that no longer fits twice on a multiprocessor."""
    assert len(kernels[case]) == count
    assert all(kernel["registers"] <= 96 for kernel in kernels[case])


def test_sampling_kernels_leave_room(kernels):
    """Guards against a tile that no longer fits twice on a multiprocessor, and passes that are compiled one by one."""
    found = kernels["sampling_rows"]
    assert sorted(kernel["kernel"] for kernel in found).count("_pass_kernel") == 4 and len(found) == 12
    assert all(kernel["registers"] <= 128 and kernel["shared_bytes"] <= 32 * 1024 for kernel in found), found


def test_prompt_logprobs_are_compiled_once(kernels):
    """Guards against a compiler in the middle of a request, for another place of results or number of tokens named."""
    found = kernels["prompt_logprobs"]
    assert len({str(sorted(kernel.items())) for kernel in found}) == 2
    assert all(kernel["registers"] <= 128 and kernel["shared_bytes"] <= 32 * 1024 for kernel in found), found


def test_latent_attention_reads_tiles_where_they_arrived(kernels):
    """Guards against a product that falls back to registers, and a tile of which two no longer fit."""
    for case in ("latent_16", "latent_16_page16", "latent_128"):
        of_case = {kernel["kernel"]: kernel for kernel in kernels[case]}
        decode = of_case["_latent_decode_kernel"]
        assert decode["wgmma"] and not decode["mma"] and decode["tma"] == (case != "latent_16_page16"), decode
        assert 2 * 64 * 576 * 2 <= decode["shared_bytes"] <= 227 * 1024, decode
    assert [len(kernels[case]) for case in ("latent_16", "latent_16_page16", "latent_128")] == [7, 1, 5]
    *_, expand, prefill = kernels["latent_16"]
    assert expand["wgmma"] and prefill["wgmma"] and prefill["tma"], (expand, prefill)


def test_prefill_attention_uses_warpgroup_instructions_and_fits(kernels):
    """Guards against a tile whose products fall back to a warp's instructions, at half the speed."""
    prefill = {case: of_case[0] for case, of_case in kernels.items() if case.startswith("prefill")}
    assert len(prefill) == 9 and all(kernel["wgmma"] for kernel in prefill.values())
    for case, kernel in prefill.items():
        assert kernel["tma"] == (("page64" in case or "page128" in case) and "96" not in case), case
        assert kernel["shared_bytes"] + 1024 <= 227 * 1024, case


def test_the_hopper_prefill_specialises_its_warps(kernels):
    """Guards against a version of Triton whose Gluon compiles to something else: no room for two tiles, or no TMA."""
    for case in ("gluon_page64", "gluon_page16"):
        (kernel,) = kernels[case]
        assert kernel["wgmma"] and kernel["tma"] and kernel["registers"] == 168, kernel
        assert 2 * 2 * 128 * 128 * 2 < kernel["shared_bytes"] <= 226 * 1024, kernel


def test_the_hopper_products_of_many_rows_specialise_their_warps(kernels):
    """Guards against a version of Triton whose Gluon splits gate from up through memory, or whose ring is too large."""
    assert [kernel["bytes"] for kernel in kernels["gluon_product_8bit"]] == ["s8", "s8"]
    for kernel in kernels["gated_product"] + kernels["gluon_product_8bit"]:
        assert kernel["wgmma"] and kernel["tma"] and not kernel["mma"] and kernel["registers"] == 168, kernel
        assert 200 * 1024 < kernel["shared_bytes"] <= 226 * 1024, kernel


def test_linears_use_warpgroup_instructions_and_fit(kernels):
    """Guards against a table entry whose tiles do not fit, or whose products fall back to a warp's instructions."""
    for rows, count in {16: 5, 64: 5, 128: 3, 256: 5}.items():
        assert len(kernels[f"linear_{rows}"]) == count
        for kernel in kernels[f"linear_{rows}"]:
            assert kernel["wgmma"] and kernel["tma"] and kernel["shared_bytes"] + 1024 <= 227 * 1024, (rows, kernel)
    assert len(kernels["linear_1"]) == len(FASTEST[1]) and not any(kernel["mma"] for kernel in kernels["linear_1"])


def test_products_of_4_bits_unpack_into_operands_of_matrix_instructions(kernels):
    """Guards against codes that take a way through shared memory, and tiles that leave no room for a second program."""
    int4 = {case: of_case for case, of_case in kernels.items() if case.startswith("int4")}
    assert len(int4) == 6 and all(of_case for of_case in int4.values())
    for case, kernel in ((case, kernel) for case, of_case in int4.items() for kernel in of_case):
        by_warp = case == "int4_gluon_8"
        assert kernel["tma"] and kernel["mma"] == by_warp and kernel["wgmma"] != by_warp, (case, kernel)
        assert kernel["shared_bytes"] + 1024 <= 227 * 1024, (case, kernel)
        if case.startswith("int4_16"):
            assert kernel["registers"] <= 168 and kernel["shared_bytes"] <= 100 * 1024, (case, kernel)


def test_linears_of_8_bits_multiply_bytes_and_keep_their_loads_ahead(kernels):
    """Guards against codes that are widened before the matrix unit, and against scales that stop the compiler from
    asking for tiles ahead: their stages then have no room in shared memory."""
    for case in ("16_row", "16_block", "64_block"):
        found = kernels[f"linear_8bit_{case}"]
        assert [kernel["bytes"] for kernel in found] == ["e4m3", "e4m3", "s8", "s8"], found
        assert all(kernel["tma"] and kernel["shared_bytes"] > 3 * 64 * 256 for kernel in found), found


def test_hopper_products_of_8_bits_leave_room_for_another(kernels):
    """Guards against codes that pass through registers, and a program that no longer fits twice on a multiprocessor, by
    shared memory and registers; of two groups of warps one does."""
    for case, codes, programs, threads in (("8", "e4m3 e4m3 s8 s8", 2, 256), ("64_block", "e4m3 e4m3", 1, 384)):
        found = kernels[f"linear_8bit_gluon_{case}"]
        assert [kernel["bytes"] for kernel in found] == codes.split(), found
        assert all(kernel["tma"] and programs * (kernel["shared_bytes"] + 1024) <= 227 * 1024 for kernel in found), (
            found
        )
        assert all(kernel["registers"] * threads * programs <= 65536 for kernel in found), found


def test_products_of_experts_use_warpgroup_instructions_and_fit(kernels):
    """Guards against rows that are gathered one by one instead of ahead, which then have no room in shared memory, and
    against tiles that leave no room for another program where two should run."""
    assert not any(kernel["wgmma"] or kernel["mma"] for kernel in kernels["experts_row"])
    for case, codes in (("experts_16", ""), ("experts_8bit_16_block", "e4m3")):
        gate_up, down = kernels[case]
        assert gate_up["wgmma"] and down["wgmma"] and gate_up["tma"] and down["tma"], case
        assert gate_up["bytes"] == down["bytes"] == codes and gate_up["registers"] <= 128, (case, gate_up)
        assert gate_up["shared_bytes"] > 80 * 1024 and down["shared_bytes"] <= 113 * 1024, (case, gate_up, down)
    _, *products = kernels["experts_gluon"]
    for kernel in products:
        assert kernel["wgmma"] and kernel["tma"] and not kernel["mma"] and kernel["registers"] == 168, kernel
        assert 200 * 1024 < kernel["shared_bytes"] <= 226 * 1024, kernel


def test_experts_of_8_bits_and_one_token_fit_at_once(kernels):
    """Guards against bytes that take a register each, and programs that take turns on 132 multiprocessors."""
    for case, gate_up, down in (("experts_8bit_row", 768, 1024), ("experts_8bit_row_block", 384, 512)):
        for number, kernel in enumerate(kernels[case]):
            programs = -(-(gate_up if number % 2 == 0 else down) // 132)
            assert programs * kernel["registers"] * 128 <= 65536, (case, kernel)
            assert programs * (kernel["shared_bytes"] + 1024) <= 227 * 1024 and not kernel["mma"], (case, kernel)


def test_kernels_of_gpt_oss_and_olmoe_fit(kernels):
    """Guards against biases, a bounded gate or sinks that cost a kernel its registers."""
    for case in ("gpt_oss_row", "gpt_oss_16", "sinks_decode", "sinks_prefill", "whole_norms"):
        assert all(kernel["stack_bytes"] == 0 for kernel in kernels[case]), kernels[case]
    assert all(kernel["wgmma"] and kernel["tma"] for kernel in kernels["gpt_oss_16"])


def test_routing_fits_one_program(kernels):
    """Guards against tokens and experts that no longer fit the registers of a program."""
    assert [len(kernels[case]) for case in ("route", "route_many")] == [2, 3]
    assert all(kernel["shared_bytes"] <= 100 * 1024 for case in ("route", "route_many") for kernel in kernels[case])
    (summed,) = kernels["norm_of_experts"]
    assert summed["registers"] <= 64, summed


def test_decode_attention_uses_matrix_instructions_and_fits(kernels):
    """Guards against a tile that falls back to scalar products, a page that is not fetched whole, and too few or too
    many programs on a multiprocessor (see decode_plan): 1 to 4 tiles in flight leave room for 5, 3, 2 and 1."""
    decode = {case: of_case[0] for case, of_case in kernels.items() if case.startswith("decode_")}
    assert len(decode) == 10 and all(kernel["mma"] for kernel in decode.values())
    for case, kernel in decode.items():
        assert kernel["tma"] == ("page64" in case and "96" not in case), case
        assert kernel["shared_bytes"] + 1024 <= 227 * 1024, case
    assert kernels["float32_decode_128"][0]["shared_bytes"] + 1024 <= 227 * 1024
    for case, programs in {"page64": 5, "page64_parts": 3, "page64_deep": 2, "page64_deepest": 1}.items():
        kernel = decode[f"decode_128_{case}"]
        assert 227 * 1024 // (kernel["shared_bytes"] + 1024) == programs
        assert kernel["registers"] * 128 * programs <= 65536


def test_attention_over_fp8_uses_matrix_instructions_and_fits(kernels):
    """Guards against numbers that are widened one by one, keys whose halves are another word's, and too few programs on
    a multiprocessor."""
    fp8 = {case.removeprefix("fp8_"): of_case[0] for case, of_case in kernels.items() if case.startswith("fp8_")}
    assert len(fp8) == 8
    for case, kernel in fp8.items():
        assert kernel["wgmma" if "prefill" in case else "mma"] and kernel["tma"] == ("page64" in case), case
        assert kernel["halves"] == ("decode" in case and "page64" in case), case
        assert kernel["shared_bytes"] + 1024 <= 227 * 1024, case
    for case, programs in {"page64_deep": 4, "page64_deepest": 3}.items():
        kernel = fp8[f"decode_{case}"]
        assert 227 * 1024 // (kernel["shared_bytes"] + 1024) == programs
        assert kernel["registers"] * 128 * programs <= 65536


def test_what_adapters_add_uses_matrix_instructions_and_fits(kernels):
    """Guards against a product that loses a second program, or its registers, to what adapters add; against halves of
    it that fall back to scalar products; and a grouping of rows that no longer fits."""
    for case, names in HALVES.items():
        grouping, *halves = kernels[case]
        assert grouping["registers"] <= 64 and [kernel["kernel"] for kernel in halves] == names
        for kernel in halves:
            assert kernel["mma"] or kernel["wgmma"], (case, kernel)
            of_few = case in ("adapters_16", "adapters_16_beside")  # parts of K are more, programs are few
            most = 192 if of_few else 168
            assert kernel["registers"] <= most and kernel["shared_bytes"] <= 40 * 1024, (case, kernel)
    for case in ("vocabulary_16", "vocabulary_64"):
        assert [kernel["kernel"] for kernel in kernels[case]] == ["_embed_ranks_kernel", *["_expand_ranks_kernel"] * 2]
        for kernel in kernels[case]:
            assert kernel["mma"] or kernel["wgmma"], (case, kernel)
            assert kernel["registers"] <= 168 and kernel["shared_bytes"] <= 40 * 1024, (case, kernel)
    *rows, head = kernels["whole_weights"]
    assert len(rows) == 2 and all(kernel["registers"] <= 64 for kernel in rows)
    assert head["wgmma"] and head["registers"] <= 168 and 3 * (head["shared_bytes"] + 1024) <= 227 * 1024
    assert all(kernel["registers"] <= 128 for kernel in kernels["adapted_linear_1"])
    for case, programs in {"adapted_linear_16": 2, "adapted_linear_32": 2, "adapted_linear_64": 1}.items():
        qkv, gate_up = kernels[case]
        for kernel in (qkv, gate_up):
            assert kernel["wgmma"] and kernel["tma"] and kernel["shared_bytes"] + 1024 <= 227 * 1024, (case, kernel)
        assert programs * (qkv["shared_bytes"] + 1024) <= 227 * 1024 and programs * qkv["registers"] * 128 <= 65536


HALVES = {
    case: ["_shrink_ranks_kernel", "_expand_ranks_kernel", "_expand_ranks_kernel"][:count]
    for case, count in {"adapters_16": 2, "adapters_64": 2, "adapters_16_beside": 3, "adapters_64_beside": 3}.items()
}
