"""Models of many kinds from their configurations, and KD with tau 2 and alpha 0.6 of two of them in plain PyTorch."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
import transformers
from torch import nn

V, H = 97, 16
TEMPERATURE, ALPHA = 2.0, 0.6
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


def t5(**options):
    shape = {"vocab_size": V, "d_model": H, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**shape | {"decoder_start_token_id": 0, "dropout_rate": 0.0} | options)
    return transformers.T5ForConditionalGeneration(config)


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
    "t5": t5,
    "t5, tied": lambda: t5(tie_word_embeddings=True),
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


def by_hand(student, teacher, batch, shift):
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
    p, q = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    soft = TEMPERATURE**2 * (q.exp() * (q - p)).sum(-1).mean()
    loss = ALPHA * soft + (1 - ALPHA) * F.cross_entropy(z, y)
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
