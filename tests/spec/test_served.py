"""What inference servers tell of a teacher, made into targets: against the teacher's own distribution in fp64."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED

from kdfast import SparseTargets, cache, distill_loss, soft_targets

S, V, K = 9, 61, 5


@dataclass
class Logprob:
    """As vLLM has it."""

    logprob: float
    rank: int | None
    decoded_token: str | None = None


class Teacher:
    """Log-probabilities of a prompt: row i is about token i + 1."""

    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        self.logits = 3 * torch.randn(S, V, dtype=torch.float64, generator=generator)
        self.logprobs = self.logits.log_softmax(-1)
        self.token_ids = torch.randint(V, (S,), generator=generator).tolist()
        self.token_ids[3] = int(self.logprobs[2].argmax())  # one that is likely, and one that is not
        self.token_ids[4] = int(self.logprobs[3].argmin())

    def top(self, row, k=K):
        values, ids = self.logprobs[row].float().topk(k)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def rank(self, row, token_id):
        return 1 + int((self.logprobs[row] > self.logprobs[row, token_id]).sum())

    def vllm(self):
        out = [None]
        for row in range(S - 1):
            given = self.token_ids[row + 1]
            told = {given: float(self.logprobs[row, given].float())} | dict(self.top(row))
            out.append({a: Logprob(value, self.rank(row, a), f"<{a}>") for a, value in told.items()})
        return out

    def sglang(self):
        of = [None, *(float(self.logprobs[row, self.token_ids[row + 1]].float()) for row in range(S - 1))]
        top = [None, *([[value, a, None] for a, value in self.top(row)] for row in range(S - 1))]
        told = [[value, a, None] for value, a in zip(of, self.token_ids, strict=True)]
        return {"prompt_tokens": S, "input_token_logprobs": told, "input_top_logprobs": top}

    def openai(self, text_of=lambda a: f"token_id:{a}"):
        def told(row, a, value):
            text = text_of(a)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                told(row, self.token_ids[row + 1], float(self.logprobs[row, self.token_ids[row + 1]].float()))
                | {"top_logprobs": [told(row, a, value) for a, value in self.top(row)]}
                for row in range(S - 1)
            ]
        }

    @property
    def gold(self):
        return torch.tensor([float(self.logprobs[row, self.token_ids[row + 1]]) for row in range(S - 1)])


@pytest.fixture
def teacher():
    return Teacher()


def check_top(targets, teacher, rows, k=K):
    """Each row holds the most probable tokens and nothing else."""
    assert targets.shape == (rows, k)
    assert (targets.method, targets.vocab_size, targets.temperatures) == ("topk", V, (1.0,))
    for row in range(S - 1):
        assert list(zip(targets.ids[row].tolist(), targets.logprobs[row].tolist(), strict=True)) == teacher.top(row, k)
    assert targets.k_eff.tolist() == [k] * (S - 1) + [0] * (rows - S + 1)


@pytest.mark.parametrize("form", ["objects", "JSON"])
def test_vllm(teacher, form):
    told = teacher.vllm()
    if form == "JSON":
        told = json.loads(json.dumps(told, default=vars))
    assert {len(entry) for entry in told[1:]} == {K, K + 1}
    targets = SparseTargets.from_vllm(told, vocab_size=V, token_ids=teacher.token_ids)
    check_top(targets, teacher, S)
    torch.testing.assert_close(targets.gold_logprob[:-1], teacher.gold)
    assert targets.gold_logprob[-1] == -math.inf
    assert SparseTargets.from_vllm(told, vocab_size=V).gold_logprob is None
    check_top(SparseTargets.from_vllm(told, vocab_size=V, k=3), teacher, S, 3)


def test_sglang(teacher):
    told = json.loads(json.dumps(teacher.sglang()))
    targets = SparseTargets.from_sglang(told, vocab_size=V, token_ids=teacher.token_ids)
    check_top(targets, teacher, S)
    torch.testing.assert_close(targets.gold_logprob[:-1], teacher.gold)
    from_third = {name: [None, *told[name][3:]] for name in ("input_top_logprobs",)}
    from_third["input_token_logprobs"] = [[None, teacher.token_ids[2], None], *told["input_token_logprobs"][3:]]
    later = SparseTargets.from_sglang(from_third, vocab_size=V, token_ids=teacher.token_ids[2:])
    torch.testing.assert_close(later.logprobs, targets.logprobs[2:])
    assert later.ids.tolist() == targets.ids[2:].tolist()


@pytest.mark.parametrize("form", ["JSON", "objects"])
def test_openai(teacher, form):
    told = teacher.openai()
    if form == "objects":
        told = json.loads(json.dumps(told), object_hook=lambda fields: SimpleNamespace(**fields))
    targets = SparseTargets.from_openai(told, vocab_size=V)
    check_top(targets, teacher, S - 1)
    torch.testing.assert_close(targets.gold_logprob, teacher.gold)


def test_openai_texts(teacher):
    """By text or by bytes; -9999 is a token of which nothing is known."""
    told = teacher.openai(lambda a: f" word{a}")
    told["content"][4]["logprob"] = -9999.0

    def by_bytes(text, raw):
        assert raw == text.encode()
        return int(raw[5:])

    for ids_of in (by_bytes, lambda text, _: {f" word{a}": a for a in range(V)}.get(text)):
        targets = SparseTargets.from_openai(told, vocab_size=V, ids_of=ids_of)
        check_top(targets, teacher, S - 1)
        assert targets.gold_logprob[4] == -math.inf
    with pytest.raises(ValueError, match=r"no id is known of the token ' word.*ids_of="):
        SparseTargets.from_openai(told, vocab_size=V)
    with pytest.raises(ValueError, match="no id is known of the token"):
        SparseTargets.from_openai(told, vocab_size=V, ids_of=lambda *_: None)


def test_the_loss_is_that_of_the_teacher(teacher):
    """As of targets that were made from the teacher's logits, in place and through a cache."""
    student = torch.randn(S - 1, V, dtype=torch.float64)
    expected = distill_loss(student, soft_targets(teacher.logits[:-1].float(), k=K), alpha=1.0)
    for targets in (
        SparseTargets.from_vllm(teacher.vllm(), vocab_size=V),
        SparseTargets.from_sglang(teacher.sglang(), vocab_size=V),
        SparseTargets.from_openai(teacher.openai(), vocab_size=V),
    ):
        torch.testing.assert_close(distill_loss(student, targets[: S - 1], alpha=1.0), expected, rtol=1e-6, atol=1e-7)
        with pytest.raises(ValueError, match="temperature"):
            distill_loss(student, targets[: S - 1], alpha=1.0, temperature=2.0)


def test_into_a_cache(teacher, tmp_path):
    targets = SparseTargets.from_vllm(teacher.vllm(), vocab_size=V, token_ids=teacher.token_ids)
    with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        writer.write("prompt", targets, torch.tensor(teacher.token_ids))
    (stored,) = cache.Reader(tmp_path / "c").read(["prompt"], [torch.tensor(teacher.token_ids)])
    assert stored.ids.tolist() == targets.ids.tolist()
    torch.testing.assert_close(stored.logprobs[:-1], targets.logprobs[:-1], atol=0.04, rtol=0)
    torch.testing.assert_close(stored.gold_logprob, targets.gold_logprob)


def of(**entries):
    """By rank, ids (as ``t3``) and their log-probabilities."""
    return {int(a[1:]): Logprob(value, rank) for a, (value, rank) in entries.items()}


def test_the_most_probable_are_those_that_were_asked_for():
    """The given token of rank K + 1 is beyond them too, where another row tells what K is."""
    told = [None, of(t0=(-0.5, 1), t1=(-1.5, 2)), of(t2=(-2.0, 3), t0=(-0.6, 1), t1=(-1.6, 2))]
    assert SparseTargets.from_vllm(told, vocab_size=V).k_eff.tolist() == [2, 2, 0]
    told = [None, of(t2=(-2.0, 3), t0=(-0.6, 1), t1=(-1.6, 2)), of(t9=(-7.0, 8), t0=(-0.6, 1), t1=(-1.6, 2))]
    assert SparseTargets.from_vllm(told, vocab_size=V).k_eff.tolist() == [2, 2, 0]
    assert SparseTargets.from_vllm([None, {5: -0.2}, {6: -0.3, 7: -2.0}], vocab_size=V).k_eff.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="ask with prompt_logprobs=K, at least 1"):
        SparseTargets.from_vllm([None, of(t0=(-0.5, 1)), of(t1=(-3.0, 4))], vocab_size=V)
    with pytest.raises(ValueError, match="prompt_logprobs is None"):
        SparseTargets.from_vllm(None, vocab_size=V)
    empty_first = [{}, of(t0=(-0.5, 1))]
    assert SparseTargets.from_vllm(empty_first, vocab_size=V).ids.tolist() == [[0], [-1]]


def test_what_is_as_good_as_no_probability(teacher):
    """-9999 stands for it where JSON has no infinity."""
    told = teacher.openai()
    told["content"][2]["top_logprobs"][4]["logprob"] = -9999.0
    assert SparseTargets.from_openai(told, vocab_size=V).k_eff.tolist() == [K, K, K - 1] + [K] * (S - 4)
    prompt = teacher.vllm()
    prompt[4][teacher.token_ids[4]] = Logprob(-9999.0, V)  # the least likely one
    targets = SparseTargets.from_vllm(prompt, vocab_size=V, token_ids=teacher.token_ids)
    check_top(targets, teacher, S)
    assert targets.gold_logprob[3] == -math.inf


def test_the_token_itself_before_the_most_probable(teacher):
    """As vLLM's chat completions have it."""
    told = teacher.openai()
    entry = told["content"][1]
    unlikely = next(a for a in range(V) if a not in [i for i, _ in teacher.top(1, 10)])
    itself = {"token": f"token_id:{unlikely}", "logprob": float(teacher.logprobs[1, unlikely]), "bytes": None}
    entry |= itself | {"top_logprobs": [itself, *entry["top_logprobs"][:-1]]}
    targets = SparseTargets.from_openai(told, vocab_size=V)
    assert targets.ids[1].tolist() == [a for a, _ in teacher.top(1, K - 1)] + [-1]
    assert targets.gold_logprob[1] == pytest.approx(itself["logprob"])


def test_what_is_told_of_the_token_itself(teacher):
    for wrong in (math.nan, 3.0):
        told = teacher.sglang()
        told["input_token_logprobs"][4][0] = wrong
        with pytest.raises(ValueError, match=r"token 3: .* is no log-probability of the token that is there"):
            SparseTargets.from_sglang(told, vocab_size=V)
    for wrong in (1.5, "x", None):
        with pytest.raises(ValueError, match="is no token id"):
            SparseTargets.from_vllm([None, {wrong: -0.5}], vocab_size=V)


def test_entries_of_no_probability_are_left_out(teacher):
    told = teacher.vllm()
    told[2][(max(told[2]) + 1) % V] = Logprob(-math.inf, 2)
    assert SparseTargets.from_vllm(told, vocab_size=V).k_eff[1] <= K + 1
    assert bool((SparseTargets.from_vllm(told, vocab_size=V).logprobs[1] > -math.inf).sum() == K)


def changed(told, at, entry):
    return [*told[:at], entry, *told[at + 1 :]]


VLLM = {
    "no None first": (lambda t: t[1:], "the first entry must be None"),
    "nothing": (lambda t: [], "the first entry must be None"),
    "a None": (lambda t: changed(t, 4, None), "token 4 has no log-probabilities"),
    "the first alone": (lambda t: t[:1], "no token with log-probabilities"),
    "twice": (lambda t: changed(t, 4, {"7": -1.0, 7: -2.0}), "token 3: id 7 is there twice"),
    "beyond the vocabulary": (lambda t: changed(t, 4, {V: -1.0}), rf"token 3: id {V} is not in \[0, {V}\)"),
    "below 0": (lambda t: changed(t, 4, {-1: -1.0}), "token 3: id -1 is not in"),
    "above 0": (lambda t: changed(t, 4, {1: 0.5}), "token 3: 0.5 of id 1 is no log-probability"),
    "NaN": (lambda t: changed(t, 4, {1: math.nan}), "token 3: nan of id 1 is no log-probability"),
    "mass": (lambda t: changed(t, 4, {1: -0.1, 2: -0.5}), "token 3: its candidates have a mass of 1.51"),
}


@pytest.mark.parametrize("case", VLLM)
def test_what_vllm_cannot_mean(teacher, case):
    change, why = VLLM[case]
    with pytest.raises(ValueError, match=why):
        SparseTargets.from_vllm(change(teacher.vllm()), vocab_size=V)


def test_of_another_prompt(teacher):
    other = teacher.token_ids[::-1]
    with pytest.raises(ValueError, match="tells nothing of token id"):
        SparseTargets.from_vllm(teacher.vllm(), vocab_size=V, token_ids=other)
    with pytest.raises(ValueError, match=f"{S} entries for 3 token_ids"):
        SparseTargets.from_vllm(teacher.vllm(), vocab_size=V, token_ids=other[:3])
    with pytest.raises(ValueError, match="not those that the server was given"):
        SparseTargets.from_sglang(teacher.sglang(), vocab_size=V, token_ids=other)
    for name in ("input_token_logprobs", "input_top_logprobs"):
        told = teacher.sglang()
        told[name] = told[name][:-1]
        with pytest.raises(ValueError, match="entries"):
            SparseTargets.from_sglang(told, vocab_size=V)
        del told[name]
        with pytest.raises(ValueError, match=f"no {name}: ask with return_logprob=True"):
            SparseTargets.from_sglang(told, vocab_size=V)
    for nothing in ({}, {"content": []}, {"content": None}):
        with pytest.raises(ValueError, match="there is no content"):
            SparseTargets.from_openai(nothing, vocab_size=V)
    for k in (0, 1.5):
        with pytest.raises(ValueError, match="k must be a whole number, at least 1"):
            SparseTargets.from_vllm(teacher.vllm(), vocab_size=V, k=k)
