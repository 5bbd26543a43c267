"""Models of ``transformers``: their output embedding as a head, so that their logits are never made."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.integrations.lora import LoRA
from kdfast.methods.layers import unwrapped
from kdfast.methods.projection import CHECKED_TOKENS, Projection
from kdfast.spec.head import LMHead

#: Factors of the logits, by the name of their option in a model's configuration; what it means where it is there.
_FACTORS = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon H1
    "output_multiplier": 1,
    "logits_scaling": -1,  # Granite divides
}

_PART_BYTES = 1 << 20


class Head(Projection):
    """The output embedding of a model of transformers, see :func:`head_of`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        scale = 1.0
        for option, power in _FACTORS.items():
            factor = getattr(config, option, None)
            if isinstance(factor, (int, float)):
                scale *= float(factor) ** power
        softcap = getattr(config, "final_logit_softcapping", None)
        name, module = type(model).__name__, _output(model)
        lora = LoRA(module, name) if LoRA.adapts(module) else None
        linear = None if lora is None else lora.layer.get_base_layer()
        super().__init__(module, scale=scale, softcap=softcap, name=name, linear=linear, low_rank=lora)


def head_of(model: nn.Module) -> Head:
    """The output embedding of a model, for ``Distiller(head=)`` and ``Distiller(teacher_head=)``.

    Scale and softcap are those that its configuration names (Gemma, Cohere, Granite), and are compared with its own
    logits once, at the first batch.

    Args:
        model: of transformers, or a ``PeftModel`` around one; it may be wrapped and compiled.

    Raises:
        ValueError: a model without an output embedding, or with one that is adapted, quantised or parametrised, which
            is named.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def model(width):
        ...     return LlamaForCausalLM(LlamaConfig(
        ...         vocab_size=50, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ...     ))
        >>> student, teacher = model(8), model(16)
        >>> heads = {"head": head_of(student), "teacher_head": head_of(teacher)}
        >>> with Distiller(student, teacher, [KD()], causal=True, **heads) as d:
        ...     loss, terms = d({"input_ids": torch.randint(0, 50, (2, 7))})
        ...     loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.soft', 'loss']
    """
    inner: Any = unwrapped(model)
    if isinstance(inner, WithoutAdapters):
        with inner.disabled() as base:
            return Head(base)
    return Head(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)


class WithoutAdapters(nn.Module):
    """The base of a student that trains adapters, as its teacher: the same modules, with the adapters disabled.

    So the teacher takes no memory of its own. Modules that both have are in eval mode for the teacher's pass alone.

    Args:
        student: a ``PeftModel``, or a wrapper around one (DistributedDataParallel, FSDP, DeepSpeed), through which the
            teacher then runs.

    Raises:
        TypeError: a model without adapters to disable.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> Distiller(student, WithoutAdapters(student), [KD()])  # doctest: +SKIP
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        if not hasattr(unwrapped(student), "disable_adapter"):
            msg = (
                f"WithoutAdapters takes a PeftModel, got {type(unwrapped(student)).__name__}: it has no disable_adapter"
            )
            raise TypeError(msg)
        self.student = student

    @property
    def config(self) -> Any:
        """The base model's."""
        return self.student_inside.config

    @property
    def student_inside(self) -> Any:
        """The PeftModel inside its wrappers."""
        return unwrapped(self.student)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Any]:
        """The base model, with the adapters disabled for so long."""
        with self.student_inside.disable_adapter():
            yield self.student_inside.get_base_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of the student, without its adapters."""
        with self.disabled():
            return self.student(*args, **kwargs)


def _output(model: Any) -> nn.Module:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        msg = f"{type(model).__name__} has no output embedding"
        raise ValueError(msg)
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT trains a copy of it
        active = [] if head.disable_adapters else [a for a in head.active_adapters if a in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active else head.original_module
    elif hasattr(head, "get_base_layer") and (head.disable_adapters or head.merged):  # an adapter that is out of use
        head = head.get_base_layer()
    module: nn.Module = head
    return module


class CausalLM:
    """A causal language model as a function of (input_ids (B, S), attention_mask (B, S)) to an LMHead over (B, S, H).

    The hidden states are those of the model's body, weight and bias those of its output embedding, softcap and scale
    what its configuration says (Gemma, Cohere, Granite). A model may do more to its logits than that: :meth:`check`
    compares with its own.

    Args:
        model: a ``transformers`` model with ``base_model`` and ``get_output_embeddings``.

    Raises:
        ValueError: a model without these, or whose output embedding is no plain floating-point projection.
    """

    def __init__(self, model: Any) -> None:
        if model.base_model is model or model.get_output_embeddings() is None:
            msg = f"{type(model).__name__} has no body beside an output embedding"
            raise ValueError(msg)
        self.model = model
        self.projection = Head(model)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> LMHead:
        """The head of a batch; gradients pass."""
        hidden = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return self.projection.head(hidden)

    @torch.no_grad()
    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Compares with the model's own logits, over the first tokens of the first sequence.

        What may differ is rounding: 4 eps of the largest logit of a token anywhere, eps in the root mean square.

        Raises:
            ValueError: they differ by more.
        """
        n = min(CHECKED_TOKENS, int(attention_mask[0].sum()))
        ids, mask = input_ids[:1, :n], attention_mask[:1, :n]
        theirs = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        head = self(ids, mask)
        product = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
        wrong = self.projection.difference(product, theirs)
        if wrong:
            raise ValueError(wrong)


def load(directory: Path, *, dtype: str, device: torch.device) -> Any:
    """A model from its directory, for inference.

    Args:
        directory: of ``save_pretrained``.
        dtype: "auto" (that of its files), or the name of one of torch's.
        device: of the model.

    Raises:
        OSError, ValueError: nothing there that transformers can load.
    """
    import transformers

    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {name: chosen}
    # Any, as the annotations of some versions take the device of `to` for the model.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True, **options)
    return model.to(device).eval()


def fingerprint(directory: Path) -> str:
    """BLAKE2b of 16 bytes that tells a model's files from others without reading all of them.

    Over config.json and, for each file of weights, its name, its size, and its first, middle and last MiB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(directory):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parts(directory: Path) -> Iterator[bytes]:
    yield (directory / "config.json").read_bytes()
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        yield path.name.encode()
        yield size.to_bytes(8, "little")
        with path.open("rb") as file:
            for first in sorted({0, size // 2, max(0, size - _PART_BYTES)}):
                file.seek(first)
                yield file.read(_PART_BYTES)
