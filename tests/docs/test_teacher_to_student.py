"""The page for users runs: token ids, a cache by the command, and the loop that trains on it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("typer", reason="the cache extra is not installed")

import tokenizers
import transformers

from kdfast import cache
from kdfast.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

PAGE = (Path(__file__).parents[2] / "docs" / "teacher-to-student.md").read_text(encoding="utf-8")
V, LENGTH = 200, 16


def language_model(hidden, folder):
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = language_model(32, "teacher")
    before = language_model(8, "student").state_dict()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    fast.save_pretrained("teacher")

    tokenise, train = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    texts = [" ".join(f"w{i}" for i in torch.randint(3, V, (n,)).tolist()) for n in (100, 3, 200)]
    exec(tokenise, {"texts": texts, "length": LENGTH})
    rows = np.load("tokens.npy")
    assert rows.shape == ((100 + 3 + 200 + 3) // LENGTH, LENGTH)
    assert rows.flatten()[100] == 2

    command = next(line for line in PAGE.splitlines() if line.startswith("kdfast cache build targets"))
    monkeypatch.setattr("sys.argv", shlex.split(command.replace("--length 2048", f"--length {LENGTH}")))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    reader = cache.Reader("targets")
    assert list(reader.keys()) == [str(i) for i in range(len(rows))]
    assert reader.temperatures == (1.0, 2.0)
    row = torch.from_numpy(rows[3].astype(np.int64))
    with torch.no_grad():
        logits = teacher.bfloat16()(row[None]).logits[0].float()
    (stored,) = reader.read(["3"], [row])
    # In bf16 a row's last bits depend on the batch that it is computed in, and ids at the boundary are all but equal:
    # which ids were kept is judged by what they hold.
    slack = 1 / 16 / 2 + 0.02  # the grid of 1/16 nat, and the logits' rounding
    exact = logits.log_softmax(-1)
    assert (stored.logprobs - exact.gather(-1, stored.ids.long())).abs().max() < slack
    assert (exact.gather(-1, stored.ids.long()).min(-1).values > exact.topk(64).values[:, -1] - slack).all()

    exec(train, scope := {})
    after = scope["student"].state_dict()
    assert 0 < scope["loss"].item() < 10
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_what_the_page_says_it_costs():
    """The tables are products of the bytes and the FLOP that they name."""
    bytes_of = dict(re.findall(r"^\| (fixed|sample)[^|]*\| ([\d.]+) \| [\d.]+ GB \|", PAGE, re.MULTILINE))
    assert set(bytes_of) == {"fixed", "sample"}
    fixed, sample = (float(bytes_of[name]) for name in ("fixed", "sample"))
    assert f"| {fixed:.0f} GB | {fixed / 100:.2f} TB |" in PAGE
    assert f"| {sample:.1f} GB | {10 * sample:.0f} GB |" in PAGE
    for rate, text in ((1e5, "100,000"), (1e6, "1,000,000")):
        read = [rate * x / 1e6 for x in (fixed, sample)]
        assert re.search(rf"\| {text} \| {read[0]:.3g} MB/s \| {read[1]:.1f} MB/s \|", PAGE)
    for billions, name in ((1, "1 B parameters"), (8, "8 B"), (70, "70 B")):
        hours = 2e9 * billions * 1e9 / 4e14 / 3600
        shown = f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"
        assert re.search(rf"\| {name} \| [\d.e]+ \| [\d,]+ \| {shown} \| {10 * hours:.0f} \|", PAGE)
    for size in (fixed, sample):
        assert f"({(1 << 30) / size / 1e6:.3g} M tokens, {int((1 << 30) / size / 2048):,} samples" in PAGE
