"""The Triton kernels compiled for every GPU of the table, without one: what would run there keeps its registers."""

from __future__ import annotations

import ast
import importlib
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from machine import INTERPRETING

pytest.importorskip("triton", reason="Triton is not installed")

from kdfast.benchmark.gpu_compile import TARGETS, compile_calls, edges, variants

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

#: One of each maker; a minute each without Triton's cache. `make nightly` has them all.
CHOSEN = os.environ.get("KDFAST_TEST_TARGETS", "sm_90 gfx942").split()
#: Bytes of a thread. The assembler that comes with Triton 3.6 spills two or four numbers of a few kernels for sm_80 and
#: sm_100, where it would rather have two programs on a processor than registers for one; for sm_90 it does not.
SPILLS = {"sm_80": 16, "sm_100": 16} if version("triton").startswith("3.6.") else {}

KERNELS = {
    *("dense_kernel", "combine_sums_kernel", "combine_values_kernel", "observe_mixture_kernel", "scale_kernel"),
    *("scan_kernel", "floor_kernel", "gather_kernel", "keep_kernel"),
    "unpack_kernel",
    *("certain_kernel", "prefix_kernel", "locate_kernel", "order_kernel", "write_kernel"),
}


def test_the_chosen_targets_are_known():
    assert CHOSEN
    assert set(CHOSEN) <= set(TARGETS)


@pytest.mark.drawn
@pytest.mark.parametrize("target", CHOSEN)
def test_no_kernel_spills(target):
    rows = compile_calls(target)
    assert {r.kernel for r in rows} == KERNELS
    (_, _, _), registers, shared, _ = TARGETS[target]
    for row in rows:
        where = f"{row.call}, {row.kernel}"
        assert row.spills <= SPILLS.get(target, 0), where
        assert 0 < row.registers <= 255, where
        assert row.shared <= shared // 4, where  # four programs on a processor, as far as it goes
        assert row.registers * row.warps * TARGETS[target][0][2] <= registers, where
        assert row.occupancy >= 0.1, where
        if row.kernel in ("dense_kernel", "scan_kernel") and "gfx" not in target:
            assert ".local" not in row.text, where
            # rows are addressed in 64 bits, and logits read and written by 16 bytes a thread
            assert "mad.lo.s64" in row.text or "mul.lo.s64" in row.text or "mul.wide" in row.text, where
            assert "ld.global" in row.text, where
        if row.kernel == "scan_kernel" and "gfx" not in target:
            assert ".v4.b32" in row.text, where


@pytest.mark.drawn
@pytest.mark.parametrize("target", [t for t in CHOSEN if t in ("sm_90", "gfx942")])
def test_one_entry_one_row_and_odd_rows_compile(target):
    """Numbers that are 1 are constants to Triton, within tuples too, and have not the methods of others."""
    rows = compile_calls(target, edges())
    assert {r.call for r in rows} == set(edges())
    assert {r.kernel for r in rows} >= KERNELS - {"scale_kernel"}


def test_the_number_of_rows_asks_for_few_kernels():
    """Splits are powers of two, and nothing else of a kernel depends on how many rows there are."""
    new = variants("sm_90", range(1, 132))
    splits = 4  # 32, which is as many as there are tiles of 4096 columns, 16, 8 and 4
    kernels = 4  # two launches of the loss, and two that combine
    assert sum(new.values()) <= splits * kernels + 1, new  # and the one that scales
    assert new[1] > 0


@pytest.mark.parametrize(
    "module",
    [
        "kdfast.kernels.triton.dense_launch",
        "kdfast.kernels.triton.select_launch",
        "kdfast.kernels.triton.unpack_launch",
        "kdfast.ops.dense",
        "kdfast.ops.dense.autograd",
        "kdfast.ops.select.triton",
        "kdfast.ops.unpack",
        "kdfast.spec.packed",
    ],
)
def test_nothing_asks_the_device(module):
    """No call that waits for a GPU, but where values are checked on request and where a tensor of the CPU is read."""
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "synchronize", "unique", "masked_select"}
    tree = ast.parse(Path(importlib.import_module(module).__file__).read_text())
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits:
                    found.add((function.name, ast.unparse(node)))
    allowed = {
        ("_check_values", "inputs.temperature.item()"),
        ("_check_values", "bad[0].item()"),
        ("run", "inputs.temperature.item()"),
        ("_part", "inputs.temperature.item()"),
    }
    assert found <= allowed, found - allowed
