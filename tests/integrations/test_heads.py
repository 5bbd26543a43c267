"""A student whose logits are never made, against the same objective of its logits, in every wrapper."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import ranks
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from machine import INTERPRETING, VARIANTS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD, CrossEntropy, FitNet, Projection
from kdfast.methods.router import router_loss

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(INTERPRETING, reason="the kernels' backend makes no difference to a head's place"),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]

V, H = 97, 16
DECODER = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: DECODER[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}


def vision():
    text = transformers.LlamaConfig(**DECODER)
    image = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    config = transformers.LlavaConfig(
        vision_config=image, text_config=text, image_token_index=V - 1, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


#: Models from their configurations: causal ones, encoder-decoder models, a masked one, and one that reads images.
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, head_dim=8)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=30.0)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**DECODER, logit_scale=0.25)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**DECODER, logits_scaling=7.0)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**{**DECODER, "num_key_value_heads": 2})),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **DECODER, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.3, head_dim=8
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=H,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    ),
    "t5, tied": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=H,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            tie_word_embeddings=True,
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=V,
            d_model=H,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=4,
            max_source_positions=6,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, num_hidden_layers=1)),
    "llava": vision,
}
SEQ2SEQ = ("t5", "t5, tied", "whisper")


def model_of(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(torch.randn_like(head.weight))
        if getattr(head, "bias", None) is not None:
            head.bias.copy_(torch.randn_like(head.bias))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.dropout = 0.0
    return model


def batch_of(name, rows=3, seed=None):
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())) if seed is None else seed)
    lengths = torch.randint(3, 9, (rows,), generator=generator)
    lengths[0] = 8
    there = torch.arange(8) < lengths[:, None]
    ids = torch.randint(3, V - 1, (rows, 8), generator=generator).masked_fill(~there, 0)
    labels = ids.masked_fill(~there, -100)
    batch = {"input_ids": ids, "attention_mask": there.long(), "labels": labels}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 4, 12, generator=generator), "labels": labels}
    if name == "llava":
        image = torch.full((rows, 4), V - 1)
        batch = {
            "input_ids": torch.cat((image, ids), 1),
            "attention_mask": torch.cat((torch.ones_like(image), there.long()), 1),
            "labels": torch.cat((torch.full_like(image, -100), labels), 1),
            "pixel_values": torch.randn(rows, 3, 4, 4, generator=generator),
        }
    return batch


def causal(name):
    return name not in (*SEQ2SEQ, "bert")


def by_hand(student, teacher, batch, shift, temperature=2.0, alpha=0.6):
    """Plain PyTorch, from the models' own logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if student.config.is_encoder_decoder:  # shifted, as the model does with labels that it gets
        start = torch.full_like(batch["labels"][:, :1], student.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat((start, batch["labels"][:, :-1]), 1).clamp(min=0)
    out = student(**inputs)
    with torch.no_grad():
        t = teacher(**inputs).logits
    z, y = out.logits, batch["labels"]
    if shift:
        z, t, y = z[:, :-1], t[:, :-1], y[:, 1:]
    kept = y != -100
    if shift and "attention_mask" in batch:
        kept &= batch["attention_mask"][:, :-1].bool()
    z, t, y = z[kept].double(), t[kept].double(), y[kept]
    p, q = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
    soft = temperature**2 * (q.exp() * (q - p)).sum(-1).mean()
    loss = alpha * soft + (1 - alpha) * F.cross_entropy(z, y)
    router = getattr(out, "aux_loss", None)
    return loss if router is None else loss + student.config.router_aux_loss_coef * router


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(got, want, what):
    assert got.keys() == want.keys(), what
    scale = max(g.abs().max().item() for g in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, name=name: f"{what} {name}: {m}"
        )


@contextlib.contextmanager
def no_logits(*models):
    """Fails where an output embedding makes logits of more than the few tokens that are checked."""
    handles = []
    for model in models:
        head = model.get_output_embeddings()

        def look(module, args, output):
            assert output.shape[-1] == 1 or output.shape[0] == 1, f"logits {tuple(output.shape)}"

        handles.append(head.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


# --- What is refused --------------------------------------------------------------------------------------------------


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


# --- Wrappers ---------------------------------------------------------------------------------------------------------


def fsdp2(model, **options):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return model, mesh


def in_groups(model):
    """As Accelerate prepares one: the last group is that of the norm and the head."""
    model, mesh = fsdp2(model)
    fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def head_apart(model):
    model, mesh = fsdp2(model)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def at_the_root(model):
    model, mesh = fsdp2(model)
    fully_shard(model, mesh=mesh)
    return model


def compiled_ddp(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


def fsdp1(model):
    layer = type(model.model.layers[0])
    policy = functools.partial(torch.distributed.fsdp.wrap.transformer_auto_wrap_policy, transformer_layer_cls={layer})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, compiled": compiled_ddp,
    "ddp, unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp": fsdp1,
    "fsdp2": at_the_root,
    "fsdp2, head apart": head_apart,
    "fsdp2, accelerate": in_groups,
}


def wrapped_equals_one(rank, world, wrapper, name, sharded_teacher):
    """Two steps of the whole batch on one process; and evaluation between them."""
    batches = [batch_of(name, rows=2 * world, seed=k) for k in range(2)]
    parts = [{k: v[rank::world] for k, v in one.items()} for one in batches]
    whole, teacher = model_of(name), model_of(name, seed=1).eval()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    want = []
    for one in batches:
        optimizer.zero_grad()
        loss = by_hand(whole, teacher, one, True)
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    model = model_of(name)
    head = head_of(model)
    wrapped = WRAPPERS[wrapper](model)
    if sharded_teacher:
        theirs = model_of(name, seed=1)
        teacher_head = head_of(theirs)
        teacher = WRAPPERS[wrapper](theirs)
    else:
        teacher_head = None
    losses = [KD(temperature=2.0, alpha=0.6)]
    with Distiller(wrapped, teacher, losses, causal=True, head=head, teacher_head=teacher_head) as d:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for one, all_of_it, value in zip(parts, batches, want, strict=True):
            y, mask = all_of_it["labels"][:, 1:], all_of_it["attention_mask"][:, :-1]
            items = ((y != -100) & mask.bool()).sum() / world
            loss, _ = d(one, num_items=items)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(
                total.double() / world, value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{wrapper}: {m}"
            )
            with torch.no_grad():
                d(one)
    if wrapper == "fsdp":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            got = {n: p.detach().clone() for n, p in model.named_parameters()}
    else:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        got = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    for (n, p), (_, q) in zip(got.items(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{wrapper} {n}: {m}"
        )


def refused_on_all_ranks(rank, world):
    """One rank's logits are others: every rank says so, and none waits."""
    model, teacher = model_of("llama"), model_of("llama", seed=1)
    head = head_of(model)
    if rank == 1:
        head.scale = 2.0
    wrapped = DistributedDataParallel(model)
    said = "times as large" if rank == 1 else "on another rank"
    with (
        Distiller(wrapped, teacher, [KD()], causal=True, head=head) as d,
        pytest.raises(ValueError, match=said),
    ):
        d(batch_of("llama"))


def test_wrappers(tmp_path):
    checks = [
        functools.partial(wrapped_equals_one, wrapper=wrapper, name="llama", sharded_teacher=False)
        for wrapper in WRAPPERS
    ]
    checks += [
        functools.partial(wrapped_equals_one, wrapper=wrapper, name=name, sharded_teacher=True)
        for wrapper, name in (("fsdp2", "gemma2"), ("fsdp2, accelerate", "llama"), ("ddp", "gemma2"))
    ]
    ranks.run([*checks, refused_on_all_ranks], 2, tmp_path)
