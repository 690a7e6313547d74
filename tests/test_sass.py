"""Claims about reading machine code: loops, stall counts and narrow copies are found in a listing of `cuobjdump`."""

from __future__ import annotations

import pytest

from eval.bench import sass

# As cuobjdump prints it: an outer loop from 0010 to 0070 around an inner one from 0020 to 0040, then padding.
LISTING = """
	code for sm_90a
		Function : a_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e700000000800 */
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R4.64] ; /* 0x00009a0000067ab9 */
                                                                                /* 0x000fcc0000000a00 */
        /*0020*/              @!P1 LDGSTS.E.LTC128B [R2+0x10], desc[UR4][R4.64] ; /* 0x0000000000047919 */
                                                                                /* 0x000fe2000f8e33ff */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ; /* 0x00000a00ff017b82 */
                                                                                /* 0x001ff000000008ff */
        /*0040*/               @P0 BRA 0x20 ;                                   /* 0xfffffffc00007947 */
                                                                                /* 0x000fea000383ffff */
        /*0050*/                   MUFU.EX2 R5, R5 ;                            /* 0x0000000500057308 */
                                                                                /* 0x000e640000000800 */
        /*0060*/                   STL [R1], R5 ;                               /* 0x0000000501007387 */
                                                                                /* 0x0003e80000100800 */
        /*0070*/              @!P2 BRA 0x10 ;                                   /* 0xfffffffc00007947 */
                                                                                /* 0x000fea000383ffff */
        /*0080*/                   MUFU.EX2 R5, R5 ;                            /* 0x0000000500057308 */
                                                                                /* 0x000e640000000800 */
        /*0090*/                   BRA 0x90;                                    /* 0xfffffffc00007947 */
                                                                                /* 0x000fc0000383ffff */
"""
TTGIR = """
    %0 = scf.for %n = %a to %b step %c iter_args(%x = %y) -> (tensor<4xf32>) : i32 {
      %1 = ttg.async_wait %u {num = 2 : i32}
      %2 = scf.if %k -> (i32) {
        scf.yield %d : i32
      } else {
        scf.yield %e : i32
      }
      %3 = ttng.warp_group_dot %v, %w, %x
      %4 = ttg.async_wait %u {num = 1 : i32}
      scf.yield %3 : tensor<4xf32>
    }
    %5 = ttg.async_wait {num = 0 : i32}
    scf.for %n = %a to %b step %c : i32 {
      %6 = ttg.async_wait %u {num = 0 : i32}
    }
"""


def test_an_instruction_has_an_opcode_without_its_guard_a_stall_count_and_a_target() -> None:
    code = sass.parse(LISTING)
    assert [x.name for x in code] == ["LDC", "LDGSTS", "LDGSTS", "HGMMA", "BRA", "MUFU", "STL", "BRA", "MUFU", "BRA"]
    assert [x.stall for x in code] == [8, 6, 1, 8, 5, 2, 4, 5, 2, 0]
    assert [x.target for x in code] == [None] * 4 + [0x20, None, None, 0x10, None, 0x90]


def test_loops_lie_between_a_backward_branch_and_its_target() -> None:
    assert sass.loops(sass.parse(LISTING)) == [sass.Span(1, 7), sass.Span(2, 4)]


def test_a_kernels_figures_are_those_of_its_loops() -> None:
    assert sass.measure(LISTING) == sass.Code([3], [14], step=31, narrow=1, mufu=1, reloads=1)


def test_code_without_a_loop_costs_nothing() -> None:
    straight = LISTING.replace("BRA 0x20 ;", "NOP ;").replace("BRA 0x10 ;", "NOP ;")
    assert sass.measure(straight) == sass.Code()


def test_a_loop_with_products_waits_for_its_oldest_copies() -> None:
    assert sass.waits(TTGIR) == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instructions": [101, 50]}, "predict: instructions [101, 50], the bar is [100, 50]"),
        ({"instructions": [100]}, "instructions [100], the bar is [100, 50]"),
        ({"registers": 201}, "registers 201, the bar is 200"),
        ({"waits": [1, 2]}, "waits [1, 2], the bar is [2, 2]"),
    ],
)
def test_a_figure_worse_than_its_bar_is_named_and_a_better_one_is_not(change: dict, words: str) -> None:
    bars = {"instructions": [100, 50], "waits": [2, 2], "registers": 200}
    better = {"instructions": [99, 50], "waits": [3, 2], "registers": 190, "mufu": 7}
    assert sass.broken_bars("predict", better, bars) == []
    (line,) = sass.broken_bars("predict", {**better, **change}, bars)
    assert line.startswith("predict: ") and words in line
    assert "must raise a bar edits docs/results/aot/bars.json and says why" in line
