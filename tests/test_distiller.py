"""Distiller: the objective around a loop, against the same sums by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from machine import ONCE
from small_models import F_IN, C, H, Hint, batch, by_hand, close, gradients, mlp, pair
from torch import nn

import kdfast
from kdfast.methods import KD, CrossEntropy, Inputs, Linear, Term

pytestmark = ONCE


def test_a_loop_of_three_lines():
    student, teacher = pair()
    x, y = batch()
    twin = copy.deepcopy(student)
    with kdfast.Distiller(student, teacher, [KD(temperature=4.0, alpha=0.9)]) as d:
        loss, terms = d((x, y))
        loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    want, soft, hard = by_hand(twin, teacher, x, y)
    want.backward()
    assert terms.keys() == {"loss", "kd", "kd.soft", "kd.hard"}
    close([terms["loss"], terms["kd.soft"], terms["kd.hard"]], [w.detach().float() for w in (want, soft, hard)])
    close(gradients(student), gradients(twin))
    assert not any(term.requires_grad for term in terms.values())


def test_metrics_in_the_log():
    student, teacher = pair()
    x, y = batch()
    with kdfast.Distiller(student, teacher, [KD(temperature=2.0, z_loss=1e-3, return_metrics=True)]) as d:
        _, terms = d((x, y))
    z, t = student(x), teacher.eval()(x)
    assert terms["kd.accuracy"] == (z.argmax(-1) == y).float().mean()
    assert terms["kd.agreement"] == (z.argmax(-1) == t.argmax(-1)).float().mean()
    for name, logits in (("student", z), ("teacher", t)):
        entropy = torch.distributions.Categorical(logits=logits.detach() / 2).entropy().mean()
        torch.testing.assert_close(terms[f"kd.{name}_entropy"], entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["kd.z"], 1e-3 * torch.logsumexp(z.detach(), -1).square().mean())


def test_weights_schedules_and_names():
    student, teacher = pair()
    x, y = batch()
    losses = [
        CrossEntropy(weight=0.5),
        CrossEntropy(weight=Linear(0.0, 1.0, steps=2)),
        (lambda step: step.student_logits().square().mean(), 3.0),
        Term(lambda step: step.student_logits().mean(), weight=lambda step: -2.0 * step, name="mean"),
    ]
    with kdfast.Distiller(student, teacher, losses) as d:
        for number in range(4):
            assert d.number == number
            loss, terms = d((x, y))
            assert terms.keys() == {"loss", "ce", "ce_2", "term", "mean"}
            z = student(x)
            ce = F.cross_entropy(z, y)
            want = 0.5 * ce + min(number / 2, 1) * ce + 3.0 * z.square().mean() - 2.0 * number * z.mean()
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            d((x, y))
        assert d.number == 4  # validation is no step


def test_models_are_as_before():
    student, teacher = pair()
    teacher[2].eval()  # modes are a module's own
    modes = [m.training for m in teacher.modules()]
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    keys, kind = list(student.state_dict()), type(student)

    def fails():
        with kdfast.Distiller(student, teacher, [KD(), Hint("0", "0")]) as d:
            d.prepare(batch())
            d(batch())
            assert not any(m.training for m in teacher.modules())
            assert all(m.training for m in student.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [m.training for m in teacher.modules()] == modes
    assert type(student) is kind
    assert list(student.state_dict()) == keys
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    for model in (student, teacher):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    with pytest.raises(RuntimeError, match="inside its context"):
        kdfast.Distiller(student, teacher, [KD()])(batch())


def test_a_pattern_without_a_layer_leaves_no_hooks():
    student, teacher = pair()
    with pytest.raises(ValueError, match="teacher has no layer 'classifier'; near it: "):
        kdfast.Distiller(student, teacher, [Hint("0", "classifier")]).__enter__()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert teacher.training


def test_prepare_makes_parameters_and_changes_nothing():
    student, teacher = nn.Sequential(nn.Linear(F_IN, H), nn.BatchNorm1d(H), nn.Linear(H, C)), mlp(2 * H)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    with kdfast.Distiller(student, teacher, [Hint("0", "0")]) as d:
        with pytest.raises(RuntimeError, match=r"hint follow from a batch's shapes: call d.prepare\(batch\)"):
            d.parameters()
        with pytest.raises(RuntimeError, match="prepare"):
            d(batch())
        d.prepare(batch())
        assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
        assert student.training
        assert d.number == 0
        assert [tuple(p.shape) for p in d.parameters()] == [(2 * H, H), (2 * H,)]
        loss, _ = d(batch())
        loss.backward()
        assert all(p.grad is not None for p in d.parameters())


def test_resume_equals_uninterrupted():
    data = [batch() for _ in range(6)]

    def models():
        return mlp(), mlp(2 * H, seed=1)

    def run(d, student, optimizer, batches):
        for one in batches:
            loss, _ = d(one)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin(student, teacher):
        return kdfast.Distiller(student, teacher, [KD(alpha=Linear(1.0, 0.0, steps=5)), Hint("0", "0")])

    torch.manual_seed(3)
    student, teacher = models()
    with begin(student, teacher) as d:
        d.prepare(data[0])
        optimizer = torch.optim.SGD([*student.parameters(), *d.parameters()], lr=0.1)
        run(d, student, optimizer, data[:3])
        saved = copy.deepcopy((student.state_dict(), d.state_dict()))
        run(d, student, optimizer, data[3:])
    resumed, teacher = models()
    with begin(resumed, teacher) as d:
        with pytest.raises(RuntimeError, match="prepare"):
            d.load_state_dict(saved[1])
        d.prepare(data[0])
        resumed.load_state_dict(saved[0])
        d.load_state_dict(saved[1])
        assert d.number == 3
        run(d, resumed, torch.optim.SGD([*resumed.parameters(), *d.parameters()], lr=0.1), data[3:])
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


def test_micro_batches_sum_to_the_whole():
    student, teacher = pair()
    x, y = batch(12)
    y[[0, 5, 6, 7]] = -100  # two of the thirds count other numbers of examples
    twin = copy.deepcopy(student)
    with kdfast.Distiller(student, teacher, [KD(), CrossEntropy(weight=0.3)], accumulation_steps=3) as d:
        total = 0
        for part in range(3):
            rows = slice(4 * part, 4 * part + 4)
            assert d.number == 0
            loss, _ = d((x[rows], y[rows]), num_items=(y != -100).sum())
            loss.backward()
            total += loss.detach()
        assert d.number == 1
    with kdfast.Distiller(twin, teacher, [KD(), CrossEntropy(weight=0.3)]) as d:
        whole, _ = d((x, y))
        whole.backward()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=1e-6)
    close(gradients(student), gradients(twin))


def test_a_loop_that_runs_the_models_itself():
    student, teacher = pair()
    x, y = batch()
    with kdfast.Distiller(student, teacher, [KD(), Hint("0", "0")]) as d:
        d.prepare(x)
        a, terms = d((x, y))
        with torch.no_grad():
            taught = teacher(x)
        b, again = d.loss(student(x), taught, y)
        assert torch.equal(a, b)
        assert terms == again
        with pytest.raises(RuntimeError, match="'0' was not run since the last loss"):
            d.loss(student(x), taught, y)
        student(x)  # a pass whose features nobody asked for
        teacher(x)
        assert torch.equal(d.loss(student(x), teacher(x), y)[0], a)  # attached teacher outputs are detached


class Lm(nn.Module):
    """A causal model in the manner of transformers: keyword inputs, an output object, no labels wanted."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, 11)

    def forward(self, input_ids, attention_mask=None):
        class Out:
            pass

        out = Out()
        out.hidden_states = (self.embed(input_ids), torch.tanh(self.body(self.embed(input_ids))))
        out.logits = self.lm_head(out.hidden_states[-1])
        return out


def test_causal_models_are_shifted_where_it_is_said():
    student, teacher = Lm(6, 1), Lm(12, 2)
    ids = torch.randint(11, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.3, -100)
    with kdfast.Distiller(student, teacher, [KD(temperature=2.0, alpha=0.5)], causal=True) as d:
        loss, _ = d({"input_ids": ids, "labels": labels, "id": ["a", "b", "c"]})
    want = kdfast.distill_loss(
        student(ids).logits[:, :-1], teacher(ids).logits[:, :-1].detach(), labels[:, 1:], temperature=2.0, alpha=0.5
    )
    torch.testing.assert_close(loss, want)


def test_padding_does_not_count_without_labels():
    student, teacher = Lm(6, 1), Lm(12, 2)
    ids = torch.randint(11, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with kdfast.Distiller(student, teacher, [KD()], causal=True) as d:
        loss, _ = d({"input_ids": ids, "attention_mask": mask})
    z, t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1].detach()
    want = kdfast.distill_loss(z, t, temperature=4.0, weights=mask[:, 1:].float())
    torch.testing.assert_close(loss, want)


def test_several_teachers():
    student, teachers = mlp(), [mlp(2 * H, seed=1), mlp(3 * H, seed=2)]
    x, y = batch()
    with kdfast.Distiller(student, teachers, [KD(teacher_weights=[1.0, 3.0])]) as d:
        loss, _ = d((x, y))
        outs = [t(x) for t in teachers]
        again, _ = d.loss(student(x), outs, y)
        with pytest.raises(ValueError, match="each of the 2 teachers, got 1"):
            d.loss(student(x), outs[:1], y)
        with pytest.raises(ValueError, match="needs one teacher, got 2"):
            kdfast.Distiller(student, teachers, [lambda step: step.teacher_logits().sum()]).__enter__()((x, y))
    want = kdfast.distill_loss(
        student(x), [o.detach() for o in outs], y, temperature=4.0, alpha=0.9, teacher_weights=[1.0, 3.0]
    )
    torch.testing.assert_close(loss, want)
    assert torch.equal(loss, again)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_cache_is_a_teacher(tmp_path, tokens):
    """Of a language model, and of a classifier, whose samples are one token long."""
    student = Lm(6, 1) if tokens > 1 else mlp()
    ids = torch.randint(11, (4, tokens))
    x = torch.randn(4, F_IN)
    columns = 11 if tokens > 1 else C
    logits = torch.randn(4, tokens, columns)
    with kdfast.cache.Writer(tmp_path / "cache", vocab_size=columns) as writer:
        for k in range(4):
            writer.write(k, kdfast.soft_targets(logits[k], k=4, temperatures=(1.0, 2.0)), token_ids=ids[k])
    reader = kdfast.cache.Reader(tmp_path / "cache")
    order = torch.tensor([2, 0, 3])
    targets = kdfast.SparseTargets.stack(reader.read([str(int(k)) for k in order]))
    with kdfast.Distiller(student, reader, [KD(temperature=2.0)]) as d:
        if tokens > 1:
            loss, _ = d({"input_ids": ids[order], "id": order})
            want = kdfast.distill_loss(student(ids[order]).logits, targets, temperature=2.0)
            with pytest.raises(kdfast.CacheError, match="'2'"):
                d({"input_ids": ids[order] + 1 - ids[order] // 10, "id": order})
            with pytest.raises(KeyError, match='"id"'):
                d({"input_ids": ids})
        else:
            loss, _ = d(Inputs(args=(x[order],), keys=order))
            want = kdfast.distill_loss(student(x[order]), targets[:, 0], temperature=2.0)
            with_targets, _ = d(Inputs(args=(x[order],), targets=targets))
            assert torch.equal(with_targets, loss)
    torch.testing.assert_close(loss, want)
    layer = "body" if tokens > 1 else "0"
    with pytest.raises(ValueError, match="cached teacher has no layers"):
        kdfast.Distiller(student, reader, [Hint(layer, layer)]).__enter__()


def test_autocast_and_a_scaler():
    student, teacher = pair()
    x, y = batch()
    with kdfast.Distiller(student, teacher, [KD(), Hint("0", "0", weight=0.1)]) as d:
        d.prepare((x, y))
        want, _ = d((x, y))
        want.backward()
        exact = gradients(student)
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = d((x, y))
        (loss * 65536).backward()
    assert loss.dtype == torch.float32
    close([g / 65536 for g in gradients(student)], exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0.02)


def test_compiled_models():
    student, teacher = pair()
    x, y = batch()
    twin = copy.deepcopy(student)
    torch._dynamo.reset()
    with kdfast.Distiller(
        torch.compile(student, fullgraph=True, backend="aot_eager"),
        torch.compile(teacher, fullgraph=True, backend="aot_eager"),
        [KD(), Hint("0", "0")],
    ) as d:
        d.prepare((x, y))
        state = copy.deepcopy(d.state_dict())
        loss, _ = d((x, y))
        loss.backward()
    with kdfast.Distiller(twin, teacher, [KD(), Hint("0", "0")]) as d:
        d.prepare((x, y))
        d.load_state_dict(state)
        want, _ = d((x, y))
        want.backward()
    torch.testing.assert_close(loss, want)
    close(gradients(student), gradients(twin))


def test_a_model_compiled_before_is_an_error_and_not_stale():
    student, teacher = pair()
    x, y = batch()
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default, said here
        compiled(x)
        with kdfast.Distiller(compiled, teacher, [Hint("0", "0")]) as d:
            d.prepare((x, y))  # in eval mode, and so compiled anew
            with pytest.raises(RuntimeError, match="enter the Distiller before its first call"):
                d((x, y))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"losses": []}, ValueError, "losses is empty"),
        ({"losses": [3.0]}, TypeError, "got float"),
        ({"losses": [(KD(), 2.0)]}, TypeError, r"KD\(weight=...\)"),
        ({"losses": KD()}, TypeError, r"losses must be a list of losses, got a single KD: give \[KD\(...\)\]"),
        ({"losses": by_hand}, TypeError, r"got a single function: give \[by_hand\]"),
        ({"losses": [KD]}, TypeError, r"the class KD: give KD\(\)"),
        ({"teacher": "bert"}, TypeError, "got str"),
        ({"accumulation_steps": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    student, teacher = pair()
    given = {"teacher": teacher, "losses": [KD()], **arguments}
    with pytest.raises(error, match=message):
        kdfast.Distiller(student, **given)


def test_the_student_is_no_teacher_of_itself():
    student, _ = pair()
    with pytest.raises(ValueError, match=r"copy.deepcopy\(student\)"):
        kdfast.Distiller(student, nn.DataParallel(student), [KD()])


def test_wrong_batches():
    student, teacher = pair()
    x, y = batch()
    with kdfast.Distiller(student, teacher, [KD(), CrossEntropy()]) as d:
        with pytest.raises(TypeError, match="got str: pass Distiller"):
            d("text")
        with pytest.raises(ValueError, match="CrossEntropy needs labels"):
            d(x)
        with pytest.raises(RuntimeError, match="entered already"):
            d.__enter__()
    with (
        kdfast.Distiller(student, None, [KD()]) as d,
        pytest.raises(ValueError, match="KD needs a teacher's logits"),
    ):
        d((x, y))
    with pytest.raises(TypeError, match="KD: reduction come with the batch"):
        KD(reduction="sum")


def test_options_that_kd_does_not_have():
    for wrong in ("T", "tau", "temp"):
        with pytest.raises(TypeError, match=f"unknown option '{wrong}': did you mean temperature"):
            KD(**{wrong: 4})
    with pytest.raises(TypeError, match="'label_smooth': did you mean label_smoothing"):
        KD(label_smooth=0.1)
    with pytest.raises(TypeError, match=r"'xyz'; it takes temperature, alpha, divergence, .*z_loss"):
        KD(xyz=1)
    assert KD(label_smoothing=0.1, tail="renorm").options == {"label_smoothing": 0.1, "tail": "renorm"}


@pytest.mark.parametrize(
    "wrong", [lambda s: s.student_logits().square(), lambda s: s.student_logits().square().sum(-1)]
)
def test_a_loss_that_returns_a_matrix(wrong):
    student, teacher = pair()
    with (
        kdfast.Distiller(student, teacher, [KD(), Term(wrong, name="size")]) as d,
        pytest.raises(ValueError, match=r"loss 'size' must return one number.*got shape \(.*\.mean\(\)"),
    ):
        d(batch())
    with (
        kdfast.Distiller(student, teacher, [Term(lambda _: 1.0, name="one")]) as d,
        pytest.raises(TypeError, match="loss 'one' must return one number, a 0-d tensor, got float"),
    ):
        d(batch())
