"""Causal models of transformers: their LMHead says what they say, or is refused; a cache built from a directory."""

from __future__ import annotations

import json
import os

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("typer", reason="the cache extra is not installed")

import tokenizers
import transformers

import kdfast
from kdfast import cache
from kdfast.cli import main
from kdfast.integrations import huggingface
from kdfast.integrations.huggingface import CausalLM, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

V = 200
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=7.0),
    "phi": lambda: transformers.PhiConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def model_of(name, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(torch.randn_like(head.weight))  # logits large enough for a softcap to matter
        if head.bias is not None:
            head.bias.copy_(torch.randn_like(head.bias))
    return model.to(dtype).eval()


def inputs(*lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = torch.randint(3, V, (n,)), 1
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_makes_the_model_s_logits(name, dtype):
    model = model_of(name, dtype)
    head = CausalLM(model)
    ids, mask = inputs(30, 11)
    head.check(ids, mask)
    with torch.no_grad():
        ours, theirs = head(ids, mask).logits(), model(input_ids=ids, attention_mask=mask).logits
    tolerance = 4 * torch.finfo(dtype).eps * theirs.abs().max().item()
    for i, n in enumerate((30, 11)):
        assert (ours[i, :n].float() - theirs[i, :n].float()).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "phi"])
def test_what_the_head_leaves_out_is_refused(name, dtype, monkeypatch):
    model = model_of(name, dtype)
    monkeypatch.setattr(huggingface, "_FACTORS", {})
    head = CausalLM(model)
    head.projection.softcap = None
    if name == "phi":
        embedding = model.get_output_embeddings()
        bare = torch.nn.Linear(32, V, bias=False, dtype=dtype)
        bare.weight = embedding.weight
        head.projection.linear = bare
    with pytest.raises(ValueError, match="makes its logits otherwise"):
        head.check(*inputs(30, 11))


def test_a_small_factor_is_refused_in_bf16(monkeypatch):
    model = model_of("llama", torch.bfloat16)
    head = CausalLM(model)
    head.projection.scale = 1.02
    with pytest.raises(ValueError, match=r"scale 1\.02"):
        head.check(*inputs(30))


def test_gradients_pass():
    model = model_of("llama")
    head = CausalLM(model)(*inputs(5))
    kdfast.distill_loss(head, labels=torch.randint(V, (1, 5))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fingerprints(tmp_path):
    a, b = model_of("llama"), model_of("llama")
    a.save_pretrained(tmp_path / "a")
    a.save_pretrained(tmp_path / "same")
    b.save_pretrained(tmp_path / "b")  # of the same configuration and size
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "same") != fingerprint(tmp_path / "b")


class TestBuild:
    @pytest.fixture
    def build(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.chdir(tmp_path)

        def call(*arguments):
            monkeypatch.setattr("sys.argv", ["kdfast", "cache", "build", *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                main()
            printed = capsys.readouterr()
            return caught.value.code, printed.err

        return call

    @pytest.fixture
    def model(self, tmp_path):
        model = model_of("gemma2")
        model.save_pretrained(tmp_path / "model")
        words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, V)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")
        fast.save_pretrained(tmp_path / "model")
        return model

    def test_text_with_the_model_s_tokenizer(self, build, model, tmp_path):
        ids = [torch.randint(3, V, (n,)) for n in (50, 3, 17)]
        rows = [{"id": f"d{i}", "text": " ".join(f"w{int(x)}" for x in one)} for i, one in enumerate(ids)]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["d.jsonl", "--model", "model", "--id-field", "id", "--length", 32, "--k", 8, "--grid", 8]
        code, errors = build("c", *options, "--batch-tokens", 64, "--temperatures", "1,2")
        assert code == 0, errors
        reader = cache.Reader("c")
        begun = [torch.cat([torch.tensor([1]), one]) for one in ids]
        expected = {"d0:0": begun[0][:32], "d0:1": begun[0][32:], "d1": begun[1], "d2": begun[2]}
        assert set(reader) == set(expected)
        for key, one in expected.items():
            (got,) = reader.read([key], [one])
            with torch.no_grad():
                given = kdfast.soft_targets(model(input_ids=one[None]).logits[0], k=8, temperatures=(1.0, 2.0))
            assert (got.dense() - given.dense()).abs().max().item() <= 1 / 256
            assert torch.allclose(got.lse[2.0], given.lse[2.0], atol=1e-2)
        metadata = reader.metadata
        assert metadata["teacher"] == "model"
        assert metadata["revision"] == fingerprint(tmp_path / "model")
        assert metadata["dtype"] == "float32"
        assert metadata["build"]["special_tokens"] is True
        assert len(metadata["tokenizer"]) == 32
        code, errors = build("whole", *options, "--whole-logits", "--dtype", "bf16", "--no-special-tokens")
        assert code == 0, errors
        assert cache.Reader("whole").metadata["dtype"] == "bfloat16"
        assert cache.Reader("whole").tokens("d1") == 3

    def test_wrong_use(self, build, model, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("w5 w6 w7")
        (tmp_path / "ids.jsonl").write_text(json.dumps({"text": [V]}))
        os.mkdir("other")
        (tmp_path / "other" / "config.json").write_text('{"model_type": "unheard of"}')
        for arguments, message in [
            (["a.txt", "--model", "model"], "the model has 64 positions: pass --length 64"),
            (["ids.jsonl", "--model", "model", "--length", 8], f"the teacher takes 0 to {V - 1}"),
            (["ids.jsonl", "--model", "other", "--length", 8], "does not load as a causal language model"),
            (["a.txt", "--model", "other", "--length", 8], "has no tokenizer that loads"),
        ]:
            code, errors = build("c", *arguments)
            assert message in errors
            assert code == 2
        monkeypatch.setattr(CausalLM, "check", lambda *_: (_ for _ in ()).throw(ValueError("otherwise")))
        code, errors = build("c", "a.txt", "--model", "model", "--length", 8)
        assert code == 2
        assert "otherwise: pass --whole-logits" in errors
        assert not (tmp_path / "c").exists()  # a job that failed before its first sample binds no other
