"""Where a head is not the model's, or is in the way: what is said."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from machine import ONCE
from torch import nn

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers
from tiny_models import H, V, batch_of, model_of

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD, CrossEntropy, Projection
from kdfast.methods.router import router_loss

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_factor_that_is_not_known_is_named(name):
    student, teacher = model_of(name), model_of(name, seed=1)
    head = head_of(student)
    head.scale, head.softcap = 1.0, None
    with (
        Distiller(student, teacher, [KD()], causal=True, head=head) as d,
        pytest.raises(
            ValueError, match=f"{type(student).__name__} makes its logits otherwise than by output projection"
        ),
    ):
        d(batch_of(name))
    assert all(m.training for m in student.modules())
    if name == "cohere":
        with pytest.raises(ValueError, match=r"they are 0.25 times as large"):
            head.check(student, (), {k: v for k, v in batch_of(name).items() if k != "labels"})


def test_heads_that_are_no_product_are_named():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    student = model_of("llama")
    for wrong in (Adapted(H, V), nn.utils.parametrizations.weight_norm(nn.Linear(H, V)), nn.Embedding(V, H)):
        student.set_output_embeddings(wrong)
        with pytest.raises(
            ValueError, match=rf"LlamaForCausalLM: its output projection is a .*{type(wrong).__name__}, and"
        ):
            head_of(student)

    class Packed(torch.Tensor):
        """A weight that computes its products itself, as one that torchao has quantised."""

    student.set_output_embeddings(nn.Linear(H, V))
    packed = torch.Tensor._make_subclass(Packed, torch.randn(V, H))
    student.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"is a torch.nn.modules.linear.Linear with a weight of Packed, torch.float32"):
        head_of(student)
    student = model_of("llama")
    replicated = nn.DataParallel(student)
    replicated.device_ids = [0, 1]
    with (
        Distiller(replicated, model_of("llama"), [KD()], causal=True, head=head_of(student)) as d,
        pytest.raises(ValueError, match=r"a model in DataParallel .* use DistributedDataParallel"),
    ):
        d(batch_of("llama"))
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        head_of(student.model)
    with pytest.raises(TypeError, match=r"head must be a kdfast.methods.Projection or None, got Linear"):
        Distiller(student, None, [CrossEntropy()], head=nn.Linear(H, V))
    with pytest.raises(ValueError, match=r"teacher_head must be one for each of the 1 teachers, or None, got 2"):
        Distiller(student, model_of("llama"), [KD()], teacher_head=[None, None])


def test_a_model_that_does_not_come_to_its_head():
    student, teacher = model_of("llama"), model_of("llama", seed=1)
    head = head_of(student)

    def patched(*args, **kwargs):
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=torch.zeros(()))

    student.forward = patched
    with (
        Distiller(student, teacher, [KD()], causal=True, head=head) as d,
        pytest.raises(RuntimeError, match=r"came 0 times to its output projection .* Liger or Unsloth"),
    ):
        d(batch_of("llama"))
    assert student.forward is patched
    with (
        Distiller(student, teacher, [KD()], causal=True) as d,
        pytest.raises(ValueError, match=r"the student returned no logits: .* Liger or Unsloth"),
    ):
        d(batch_of("llama"))


def test_any_model_s_last_layer():
    """Without transformers: a classifier of very many classes."""

    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.body, self.last = nn.Linear(5, H), nn.Linear(H, V)

        def forward(self, x):
            return self.last(self.body(x).relu()) * 0.5

    student, teacher = Model(0), Model(1)
    x, y = torch.randn(6, 5), torch.randint(V, (6,))
    want, _ = Distiller(student, teacher, [KD()]).__enter__()((x, y))
    with Distiller(student, teacher, [KD()], head=Projection(student.last, scale=0.5)) as d:
        torch.testing.assert_close(d((x, y))[0], want)
    with (
        Distiller(student, teacher, [KD()], head=Projection(student.last)) as d,
        pytest.raises(ValueError, match=r"the model makes its logits otherwise .* they are 0.5 times as large"),
    ):
        d((x, y))


@pytest.mark.parametrize("kind", ["scaled", "padded columns", "a tuple", "flattened"])
def test_what_a_model_does_in_place(kind):
    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.body, self.last = nn.Embedding(V, H), nn.Linear(H, V)

        def forward(self, input_ids):
            hidden = self.body(input_ids)
            z = self.last(hidden.flatten(0, 1)).view(*input_ids.shape, V) if kind == "flattened" else self.last(hidden)
            if kind == "scaled":
                z *= 0.25
            elif kind == "padded columns":
                z[..., 90:] = -1e4
            return (z, hidden) if kind == "a tuple" else z

    student, teacher, ids = Model(0), Model(1), torch.randint(V, (3, 5))
    with Distiller(student, teacher, [KD()]) as d:
        want, _ = d({"input_ids": ids})
    for who in ("student", "teacher"):
        scale = 0.25 if kind == "scaled" else 1.0
        model = student if who == "student" else teacher
        heads = {("head" if who == "student" else "teacher_head"): Projection(model.last, scale=scale)}
        with Distiller(student, teacher, [KD()], **heads) as d:
            if kind == "padded columns":
                with pytest.raises(ValueError, match="makes its logits otherwise than by output projection"):
                    d({"input_ids": ids})
            elif kind == "flattened":
                with pytest.raises(RuntimeError, match="the model does not take the logits of its first tokens in the"):
                    d({"input_ids": ids})
            else:
                d({"input_ids": ids[:, :0]})  # of which nothing can be compared
                torch.testing.assert_close(d({"input_ids": ids})[0], want)
        if kind == "scaled":
            wrong = {name: Projection(model.last) for name in heads}
            with (
                Distiller(student, teacher, [KD()], **wrong) as d,
                pytest.raises(ValueError, match=r"0\.25 times as large"),
            ):
                d({"input_ids": ids})


def test_a_loss_that_runs_the_student_again():
    student, teacher, batch = model_of("llama"), model_of("llama", seed=1), batch_of("llama")

    def again(step):
        return student(batch["input_ids"]).logits.mean()

    with Distiller(student, teacher, [KD(), (again, 0.1)], causal=True, head=head_of(student)) as d:
        with pytest.raises(RuntimeError, match="is in its forward pass, where its head computes the losses: no loss"):
            d(batch)
        assert d.number == 0
    assert "forward" not in vars(student)


@pytest.mark.parametrize("fused", [False, True])
def test_a_router_s_loss_has_its_share(fused):
    student, teacher, batch = model_of("mixtral"), model_of("mixtral", seed=1), batch_of("mixtral", rows=4)
    batch = {k: v[:1].expand(4, -1) for k, v in batch.items()}  # rows alike, so that the parts are as the whole
    heads = {"head": head_of(student)} if fused else {}
    with Distiller(student, teacher, [KD()], causal=True, **heads) as d:
        whole, terms = d(batch)
        assert terms["router"] > 0
        items = ((batch["labels"][:, 1:] != -100) & batch["attention_mask"][:, :-1].bool()).sum()
        found = [d({k: v[i : i + 1] for k, v in batch.items()}, num_items=items) for i in range(4)]
    torch.testing.assert_close(sum(loss for loss, _ in found), whole, rtol=1e-4, atol=1e-5)
    for _, of_part in found:  # a term is what it is before its share is taken
        torch.testing.assert_close(of_part["router"], terms["router"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Linear returns aux_loss, and its configuration has no coefficient of it"):
        router_loss(nn.Linear(1, 1), {"aux_loss": torch.ones(())})
