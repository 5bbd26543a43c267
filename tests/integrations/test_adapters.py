"""Students that train adapters, and their own base as the teacher."""

from __future__ import annotations

import copy
import functools

import pytest
import ranks
import torch
from machine import ONCE
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import peft
from tiny_llama import V, by_hand, model_of

from kdfast import Distiller
from kdfast.integrations.huggingface import WithoutAdapters, head_of
from kdfast.methods import KD

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers and PEFT

ADAPTED = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "head apart": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def base():
    return model_of(0, attention_dropout=0.3)  # so that a mode that is wrong is seen


def adapted(kind):
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_dropout=0.0, **ADAPTED[kind]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.3 if "lora" in name else 0.05))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ADAPTED)
def test_a_student_and_its_own_base(kind, fused):
    student, teacher, ids = adapted(kind), base().eval(), torch.randint(V, (3, 8))
    student.train()
    want = by_hand(student, teacher, ids)
    want.backward()
    expected = gradients(student)
    student.zero_grad()
    own = WithoutAdapters(student)
    heads = {"head": head_of(student), "teacher_head": head_of(own)} if fused else {}
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    with Distiller(student, own, [KD(temperature=2.0, alpha=0.6)], causal=True, **heads) as d:
        for _ in range(2):
            student.zero_grad()
            loss, _ = d({"input_ids": ids, "labels": ids})
            loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    found = gradients(student)
    assert found.keys() == expected.keys() == trainable
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-8)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable
    assert student.training
    with pytest.raises(TypeError, match="WithoutAdapters takes a PeftModel, got LlamaForCausalLM"):
        WithoutAdapters(base())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"has dropout 0\.1"),
        ({"use_dora": True}, "has a variant of LoRA"),
    ],
)
def test_heads_that_are_adapted_otherwise_are_refused(options, message):
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], **options)
    with pytest.raises(ValueError, match=message):
        head_of(peft.get_peft_model(base(), config))
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"its output projection is a peft.tuners.ia3.layer.Linear, and not a product"):
        head_of(peft.get_peft_model(base(), ia3))


def test_several_adapters_of_a_head_one_merged_and_a_teacher_s():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    teacher, ids = peft.get_peft_model(base(), config), torch.randint(V, (3, 8))
    teacher.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    teacher.base_model.set_adapter(["default", "second"])
    student = model_of(3)
    want = by_hand(student, teacher.eval(), ids)
    batch = {"input_ids": ids, "labels": ids}
    for _ in range(2):
        heads = {"head": head_of(student), "teacher_head": head_of(teacher)}
        with Distiller(student, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, **heads) as d:
            torch.testing.assert_close(d(batch)[0], want, rtol=1e-4, atol=1e-6)
        teacher.merge_adapter()


def test_a_head_s_adapter_in_16_bit():
    """PEFT keeps adapters of a bf16 model in fp32."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    student, ids = peft.get_peft_model(base().bfloat16(), config), torch.randint(V, (3, 8))
    student.eval()
    want = by_hand(student, model_of(1).bfloat16(), ids)
    want.backward()
    expected = gradients(student)
    student.zero_grad()
    losses = [KD(temperature=2.0, alpha=0.6)]
    with Distiller(student, model_of(1).bfloat16(), losses, causal=True, head=head_of(student)) as d:
        loss, _ = d({"input_ids": ids, "labels": ids})
        loss.backward()
    torch.testing.assert_close(loss, want.float(), rtol=2e-2, atol=2e-2)
    found = gradients(student)
    assert {name for name in found if "lora" in name} == found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=5e-2, atol=5e-2 * gradient.abs().max().item())


def ddp_equals_one(rank, world, kind):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(V, (2 * world, 8), generator=generator)
    whole, teacher = adapted(kind), base().eval()
    by_hand(whole, teacher, ids).backward()
    student = adapted(kind)
    wrapped = DistributedDataParallel(student)
    own = WithoutAdapters(wrapped)
    heads = {"head": head_of(wrapped), "teacher_head": head_of(own)}
    with Distiller(wrapped, own, [KD(temperature=2.0, alpha=0.6)], causal=True, **heads) as d:
        part = ids[rank::world]
        d({"input_ids": part, "labels": part})[0].backward()
    found, want = gradients(student), gradients(whole)
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_equal_one(tmp_path):
    ranks.run([functools.partial(ddp_equals_one, kind=kind) for kind in ("head apart", "head")], 2, tmp_path)


def test_a_base_that_has_the_adapters_is_no_teacher():
    whole = base()
    student = peft.get_peft_model(whole, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"teacher is the base of the student, in which its adapters are: give .*WithoutAdapters"
    ):
        Distiller(student, whole, [KD()])
    with pytest.raises(TypeError, match="teacher must be a module"):
        Distiller(student, WithoutAdapters, [KD()])
    with (
        Distiller(student, base(), [KD()], causal=True, head=head_of(base())) as d,
        pytest.raises(
            ValueError, match="the head is of another model, LlamaForCausalLM, than of the one that is called"
        ),
    ):
        d({"input_ids": torch.randint(V, (2, 5))})


def test_copies_have_adapters_of_their_own():
    student = adapted("body")
    own = WithoutAdapters(student)
    twin = copy.deepcopy(own)
    ids = torch.randint(V, (2, 5))
    torch.testing.assert_close(
        twin(input_ids=ids).logits,
        base().eval()(input_ids=ids).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    assert not torch.allclose(student(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-2)
