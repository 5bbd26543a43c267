"""The arithmetic of ``kdfast plan``, by hand and against what a call really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kdfast.ops.head import operators as head
from kdfast.plan import plan

N, V, H = 2048, 151936, 256


def memory(**options):
    return {c.path: c.memory for c in plan(tokens=N, vocab=V, hidden=H, **options)}


def test_by_hand():
    fp32 = memory(itemsize=4)
    logits, weight = N * V * 4, V * H * 4
    assert fp32["distill_loss(logits, logits)"] == 3 * logits + weight
    assert fp32["the same, overwrite_logits=True"] == 2 * logits + weight
    assert fp32["eager, stored logits"] == 7 * logits + weight
    rows = head.chunk_rows(N, 2 * V * 4, head.CHUNK_BYTES["cpu"])
    assert rows * 2 * V * 4 <= head.CHUNK_BYTES["cpu"]
    assert fp32["distill_loss(LMHead, LMHead)"] == rows * 2 * V * 4 + weight
    bf16 = memory(itemsize=2)
    assert bf16["distill_loss(logits, SparseTargets)"] == logits + N * (64 * 8 + 8) + weight // 2


def test_leaner_with_every_step():
    for options in ({"itemsize": 4}, {"itemsize": 2, "device": "cuda"}):
        costs = plan(tokens=8192, vocab=V, hidden=1024, **options)
        eager, ours, overwriting, *_ = (cost.memory for cost in costs)
        assert eager > ours > overwriting > max(cost.memory for cost in costs[4:])


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"kept": 0}, {"device": "tpu"}])
def test_wrong_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        plan(**{"tokens": 1, "vocab": 2, "hidden": 3} | bad)


def test_command(tmp_path):
    line = "from kdfast.cli import main; main()"
    sizes = ["--vocab", str(V), "--hidden", str(H), "--tokens", str(N)]

    def run(*more):
        command = [sys.executable, "-c", line, "plan", *sizes, *more]
        narrow = {**os.environ, "COLUMNS": "80"}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=narrow)

    done = run()
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    costs = plan(tokens=N, vocab=V, hidden=H, device="cuda")
    for cost in costs:  # each path and its memory in one line, whole
        assert any(cost.path in text and f" {cost.memory / 2**30:,.2f} " in text for text in lines)
        assert any(text.strip() == cost.remark for text in lines)
    found = json.loads(run("--json").stdout)
    assert found["sizes"]["tokens"] == N
    assert [row["memory"] for row in found["paths"]] == [cost.memory for cost in costs]
    wrong = run("--dtype", "int8")
    assert wrong.returncode == 2
    assert "--dtype" in wrong.stderr
