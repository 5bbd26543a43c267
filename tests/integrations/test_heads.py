"""A student whose logits are never made, against the same objective of its logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from machine import ONCE

pytest.importorskip("transformers", reason="the hf extra is not installed")

from tiny_models import MODELS, batch_of, by_hand, causal, close, gradients, model_of, no_logits

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD, CrossEntropy, FitNet

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.mark.parametrize("taught", ["logits", "head"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name, taught):
    student, teacher, batch = model_of(name), model_of(name, seed=1), batch_of(name)
    want = by_hand(student, teacher.eval(), batch, causal(name))
    want.backward()
    expected = copy.deepcopy(gradients(student))
    student.zero_grad()
    heads = {"head": head_of(student)} | ({"teacher_head": head_of(teacher)} if taught == "head" else {})
    teacher.train()
    loss = KD(temperature=2.0, alpha=0.6)
    with Distiller(student, teacher, [loss], causal=causal(name), **heads) as d:
        with no_logits(student, *([teacher] if taught == "head" else [])):
            got, terms = d(batch)
        got.backward()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        close(gradients(student), expected, name)
        assert ("router" in terms) == (name == "mixtral")
        assert all(m.training for m in student.modules())
        student.eval()
        with torch.no_grad():
            again, terms = d(batch)
        want = by_hand(student, teacher.eval(), batch, causal(name)).detach()
        torch.testing.assert_close(again.double(), want, rtol=1e-5, atol=1e-6)
    assert not any(p.grad is not None for p in teacher.parameters())
    assert "forward" not in vars(student)
    assert "forward" not in vars(student.get_output_embeddings())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    student, teacher, batch = model_of("llama"), model_of("llama", seed=1).eval(), batch_of("llama")
    by_hand(student, teacher, batch, True).backward()
    expected = copy.deepcopy(gradients(student))
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    student.enable_input_require_grads()
    with Distiller(student, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, head=head_of(student)) as d:
        d(batch)[0].backward()
    close(gradients(student), expected, "checkpointed")


@pytest.mark.parametrize("fused", [False, True])
def test_autocast(fused):
    """The head computes as its layer does: a product in bf16, and the rest in fp32."""
    student, teacher, batch = model_of("llama"), model_of("llama", seed=1), batch_of("llama")
    head = {"head": head_of(student)} if fused else {}
    with (
        torch.autocast("cpu", torch.bfloat16),
        Distiller(student, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, **head) as d,
    ):
        loss, _ = d(batch)
    want = by_hand(student, teacher.eval(), batch, True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["module", "in place"])
def test_compiled(kind):
    torch._dynamo.reset()
    student, teacher, batch = model_of("gemma2"), model_of("gemma2", seed=1).eval(), batch_of("gemma2")
    del student.model.layers[1:]  # what takes longest here is the compiler
    want = by_hand(student, teacher, batch, True)
    want.backward()
    expected = copy.deepcopy(gradients(student))
    student.zero_grad()
    head, compiled = head_of(student), student
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    if kind == "module":
        compiled = torch.compile(student, backend=graphs)
    else:
        student.compile(backend=graphs)
    with Distiller(compiled, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, head=head) as d:
        for _ in range(3):
            student.zero_grad()
            loss, _ = d(batch)
            loss.backward()
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-5, atol=1e-6)
    close(gradients(student), expected, kind)
    assert graphs.op_count > 25  # of the body, which is compiled
    torch._dynamo.reset()


def test_other_losses_beside_it():
    """Layers are kept on the way to the head; what the model returns comes after it."""
    student, teacher, batch = model_of("llama"), model_of("llama", seed=1), batch_of("llama")
    losses = [KD(), CrossEntropy(weight=0.3), FitNet("model.layers.*", "model.layers.*", weight=0.1)]
    twin = copy.deepcopy(student)
    found = []
    for model, heads in ((student, {"head": head_of(student), "teacher_head": head_of(teacher)}), (twin, {})):
        with Distiller(model, teacher, losses, causal=True, **heads) as d:
            if not found:
                d.prepare(batch)
            loss, terms = d(batch, num_items=100)
            loss.backward()
            found.append((terms, gradients(model)))
    assert found[0][0].keys() == found[1][0].keys()
    for name, term in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], term, rtol=1e-5, atol=1e-6)
    close(found[0][1], found[1][1], "losses")
    wanted = [FitNet(":hidden_states.*", ":hidden_states.*")]
    for heads in ({"head": head_of(student)}, {"teacher_head": head_of(teacher)}):
        with pytest.raises(ValueError, match=r"':hidden_states.\*' is a part of what the model returns, which a head"):
            Distiller(student, teacher, wanted, causal=True, **heads).__enter__()
