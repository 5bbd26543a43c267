"""The soak of the cache, for a few rounds; ``make nightly`` has it for an hour."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SEED

SOAK = Path(__file__).parent / "soak.py"


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and /proc says what memory is its own")
def test_no_promised_sample_is_lost_when_writers_are_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SOAK), str(tmp_path), "--rounds", "3", "--seed", str(SEED)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    said = re.search(
        r"3 rounds in \d+ s: (\d+) writers killed, (\d+) samples promised, \d+ saved by repairs, (\d+) reads, none",
        done.stdout,
    )
    assert said, done.stdout
    killed, promised, read = map(int, said.groups())
    assert killed >= 36  # twelve a round
    assert promised >= 240  # all of the first round, whose last writers are not killed
    assert read > 2 * 240
