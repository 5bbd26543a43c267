"""``kdfast cache build`` of conversations: the tokens of the chat template, and the rows that are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cache_jobs import assert_holds, command_line, lines
from cache_teachers import V

from kdfast import cache, distill_loss
from kdfast.cache.job.samples import Document, samples_of

tokenizers = pytest.importorskip("tokenizers", reason="the cache extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

# "w1" begins what the assistant says, "w2" what others say, and "w3" ends the first.
STOCK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w1 {{ m.content }} w3 "
    "{% else %}w2 {{ m.content }} {% endif %}{% endfor %}"
)
MARKED = STOCK.replace("{{ m.content }} w3 ", "{% generation %}{{ m.content }} w3 {% endgeneration %}")
OPTIONS = ["--field", "messages", "--id-field", "id", "--tokenizer", "tokenizer", "--k", 8]


@pytest.fixture
def build(monkeypatch, capsys, tmp_path):
    return command_line(monkeypatch, capsys, tmp_path)


def save_tokenizer(template=None):
    words = {f"w{i}": i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained("tokenizer")


def turn(role, ids):
    return {"role": role, "content": " ".join(f"w{i}" for i in ids)}


@pytest.fixture
def conversations(tmp_path):
    """By key the messages, and beside them the tokens and which of them the assistant has said."""
    rng, rows, tokens, said = np.random.default_rng(0), [], {}, {}
    for number, roles in enumerate(
        (["user", "assistant"], ["system", "user", "assistant", "user", "assistant"], ["user"])
    ):
        messages, ids, mask = [], [], []
        for role in roles:
            content = rng.integers(5, V, rng.integers(1, 9)).tolist()
            messages.append(turn(role, content))
            own = [*content, 3] if role == "assistant" else content
            ids += [1 if role == "assistant" else 2, *own]
            mask += [False, *[role == "assistant"] * len(own)]
        key = f"talk {number}"
        rows.append({"id": key, "messages": messages})
        tokens[key], said[key] = torch.tensor(ids), torch.tensor(mask)
    lines(tmp_path / "d.jsonl", rows)
    return tokens, said


@pytest.mark.parametrize("template", [STOCK, MARKED])
def test_the_tokens_of_the_template(build, conversations, template):
    tokens, _ = conversations
    save_tokenizer(template)
    assert build("c", "d.jsonl", *OPTIONS)[0] == 0
    assert_holds("c", tokens)
    assert len(cache.Reader("c").metadata["build"]["chat_template"]) == 32


def test_a_template_beside_the_tokenizer(build, conversations, tmp_path):
    tokens, _ = conversations
    save_tokenizer()
    code, _, errors = build("c", "d.jsonl", *OPTIONS)
    assert code == 2
    assert "'talk 0' is a conversation, and there is no chat template" in errors
    (tmp_path / "own.jinja").write_text(MARKED)
    assert build("c", "d.jsonl", *OPTIONS, "--chat-template", "own.jinja")[0] == 0
    assert_holds("c", tokens)
    (tmp_path / "other.jinja").write_text(MARKED + " w4")
    code, _, errors = build("c", "d.jsonl", *OPTIONS, "--chat-template", "other.jinja")
    assert code == 1
    assert "mismatch" in errors
    code, _, errors = build("d", "d.jsonl", *OPTIONS, "--chat-template", "none.jinja")
    assert code == 2
    assert "--chat-template must be a file" in errors


@pytest.mark.parametrize("teacher", ["dense", "head"])
@pytest.mark.parametrize("method", ["topk", "topp", "sample", "pps"])
def test_completions_only(build, conversations, method, teacher):
    """Rows about what the assistant says are those of all; the others have no entries, and cost a few bytes."""
    tokens, said = conversations
    save_tokenizer(MARKED)
    options = [*OPTIONS, "--method", method, *(["--p", 0.9] if method == "topp" else [])]
    made_by = ("--factory", f"cache_teachers:{teacher}")
    assert build("c", "d.jsonl", *options, "--completions-only", teacher=made_by)[0] == 0
    assert build("all", "d.jsonl", *options, teacher=made_by)[0] == 0
    some, every = cache.Reader("c"), cache.Reader("all")
    assert set(some) == set(tokens)
    for key, mask in said.items():
        kept = torch.cat([mask[1:], torch.tensor([False])])
        (got,), (want,) = (reader.read([key], [tokens[key]]) for reader in (some, every))
        assert (got.valid.any(-1) == kept).all()
        assert (got.k_eff if got.k_eff is not None else got.valid.sum(-1))[~kept].sum() == 0
        assert torch.equal(got.ids[kept], want.ids[kept])
        torch.testing.assert_close(got.dense()[kept], want.dense()[kept])
    assert cache.verify("c").faults == []
    assert some.metadata["build"]["completions_only"] is True
    assert "completions_only" not in every.metadata["build"]


def test_the_loss_is_that_of_the_completions(build, conversations):
    tokens, said = conversations
    save_tokenizer(MARKED)
    assert build("c", "d.jsonl", *OPTIONS, "--completions-only")[0] == 0
    assert build("all", "d.jsonl", *OPTIONS)[0] == 0
    some, every = cache.Reader("c"), cache.Reader("all")
    for key, ids in tokens.items():
        if said[key].any():
            student, labels = torch.randn(len(ids) - 1, V), ids[1:].masked_fill(~said[key][1:], -100)
            got, want = (distill_loss(student, reader[key][: len(ids) - 1], labels) for reader in (some, every))
            torch.testing.assert_close(got, want)


def test_a_template_that_marks_nothing(build, conversations):
    """As those of most models: what to do is said, and nothing is written."""
    save_tokenizer(STOCK)
    code, _, errors = build("c", "d.jsonl", *OPTIONS, "--completions-only")
    assert code == 2
    assert "'talk 0'" in errors
    assert "{% generation %}" in errors


def test_longer_than_a_sample(build, conversations):
    """The first tokens are kept, as trainers cut a conversation; of a text all are, in pieces."""
    tokens, _ = conversations
    save_tokenizer(MARKED)
    assert build("c", "d.jsonl", *OPTIONS, "--length", 6)[0] == 0
    assert_holds("c", {key: ids[:6] for key, ids in tokens.items()})


def test_the_row_of_a_cut(conversations):
    """The last row is about a token that is not there, whoever says it."""
    tokens, said = conversations
    ids, mask = tokens["talk 1"].numpy(), said["talk 1"].numpy()
    for length in range(1, len(ids) + 2):
        document = Document("k", [turn("user", [5])], False, 1.0)
        (sample,) = samples_of([document], None, length, chat=lambda messages, key: (ids, mask))
        n = min(length, len(ids))
        assert sample.token_ids.tolist() == ids[:n].tolist()
        assert sample.kept.tolist() == [*mask[1:n].tolist(), False]


WRONG = {
    "no role": ([{"content": "w1"}], "message 0 must have a role, it has content"),
    "half of a pair": ([{"role": "user", "content": "\ud800"}], "a message must be text that UTF-8 can hold"),
    "mixed": ([{"role": "user", "content": "w1"}, 7], "a list of token ids or one of messages"),
    "nothing": ([], None),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_conversation(build, tmp_path, case):
    messages, why = WRONG[case]
    save_tokenizer(MARKED)
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "a", "messages": messages}) + "\n")
    code, _, errors = build("c", "d.jsonl", *OPTIONS)
    if why is None:  # a list of no token ids
        assert code == 0
        assert cache.Reader("c")["a"].shape == (0, 8)
        return
    assert code == 2
    assert why in errors


def test_texts_have_no_completions(build, tmp_path):
    save_tokenizer(MARKED)
    lines(tmp_path / "d.jsonl", [{"text": "w5 w6"}])
    code, _, errors = build("c", "d.jsonl", "--tokenizer", "tokenizer", "--completions-only")
    assert code == 2
    assert "'0' is no conversation, and --completions-only is for them" in errors
    assert build("c", "d.jsonl", "--tokenizer", "tokenizer", "--k", 8)[0] == 0
    assert_holds("c", {"0": torch.tensor([5, 6])})
    assert "chat_template" not in cache.Reader("c").metadata["build"]


@pytest.mark.parametrize(
    ("template", "why"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 / 0 }}", "zero")],
)
def test_a_template_that_raises(build, conversations, template, why):
    save_tokenizer(template)
    code, _, errors = build("c", "d.jsonl", *OPTIONS)
    assert code == 2
    assert "'talk 0'" in errors
    assert why in errors


def test_a_template_that_is_no_text(build, conversations, tmp_path):
    save_tokenizer()
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    code, _, errors = build("c", "d.jsonl", *OPTIONS, "--chat-template", "t.jinja")
    assert code == 2
    assert "t.jinja: 'utf-8' codec" in errors


def test_what_is_not_said_and_what_is_no_conversation(build, tmp_path):
    """An assistant that says nothing has no completion; a text among conversations has none either, and is refused."""
    save_tokenizer(MARKED.replace("w3 ", ""))
    talks = [{"id": "a", "messages": [turn("user", [5]), turn("assistant", [])]}]
    lines(tmp_path / "d.jsonl", talks)
    assert build("c", "d.jsonl", *OPTIONS, "--completions-only")[0] == 0
    assert not cache.Reader("c")["a"].valid.any()
    lines(tmp_path / "d.jsonl", [*talks, {"id": "b", "messages": "w5 w6"}])
    code, _, errors = build("d", "d.jsonl", *OPTIONS, "--completions-only")
    assert code == 2
    assert "'b' is no conversation" in errors
    lines(tmp_path / "d.jsonl", [{"id": "b", "messages": "w5 w6"}, *talks])
    code, _, errors = build("e", "d.jsonl", *OPTIONS)
    assert code == 2
    assert "the first document says whether all are" in errors
