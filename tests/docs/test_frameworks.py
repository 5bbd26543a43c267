"""The pages of docs/frameworks: each has a whole script, short, that runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from machine import ONCE_ON_THE_CPU

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"
NEEDS = {
    "loop": ("transformers",),
    "accelerate": ("transformers", "accelerate"),
    "trainer": ("transformers", "accelerate"),
    "trl": ("transformers", "trl"),
    "lightning": ("transformers", "lightning"),
}
SAYS = {
    "loop": "'kd.soft'",
    "accelerate": "",
    "trainer": "eval_mean_token_accuracy",
    "trl": "mean_token_accuracy",
    "lightning": "train/kd.soft",
}

pytestmark = ONCE_ON_THE_CPU


def script(page):
    (found,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)
    return found


def test_every_page_is_run():
    assert {page.stem for page in PAGES.glob("*.md")} == {"README", *NEEDS}


@pytest.mark.parametrize("page", NEEDS)
def test_script(page, tmp_path):
    for package in NEEDS[page]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    text = script(page)
    assert len([line for line in text.splitlines() if line.strip()]) < 40
    (tmp_path / "script.py").write_text(text)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[page] in done.stdout
