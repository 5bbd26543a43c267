"""Causal language models of ``transformers``: their logits as an LMHead, never whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.spec.head import LMHead

#: Factors of the logits, by the name of their option in a model's configuration; what it means where it is there.
_FACTORS = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon H1
    "output_multiplier": 1,
    "logits_scaling": -1,  # Granite divides
}

_CHECKED_TOKENS = 32
_PART_BYTES = 1 << 20


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
        head = model.get_output_embeddings()
        name = type(model).__name__
        if model.base_model is model or head is None:
            msg = f"{name} has no body beside an output embedding"
            raise ValueError(msg)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            msg = f"{name}: its output embedding is no plain projection with a floating-point weight"
            raise ValueError(msg)
        self.model = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = 1.0
        for option, power in _FACTORS.items():
            factor = getattr(config, option, None)
            if isinstance(factor, (int, float)):
                self.scale *= float(factor) ** power

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> LMHead:
        """The head of a batch; gradients pass."""
        hidden = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        return LMHead(hidden, head.weight, getattr(head, "bias", None), self.softcap, self.scale)

    @torch.no_grad()
    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Compares with the model's own logits, over the first tokens of the first sequence.

        What may differ is rounding: 4 eps of the largest logit of a token anywhere, eps in the root mean square.

        Raises:
            ValueError: they differ by more.
        """
        n = min(_CHECKED_TOKENS, int(attention_mask[0].sum()))
        ids, mask = input_ids[:1, :n], attention_mask[:1, :n]
        head = self(ids, mask)
        ours = head.logits()[0]
        theirs = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        name = type(self.model).__name__
        if ours.shape != theirs.shape:
            msg = f"{name} gives logits {tuple(theirs.shape)}, hidden states and output embedding {tuple(ours.shape)}"
            raise ValueError(msg)
        eps = torch.finfo(head.hidden.dtype).eps  # the model rounds to it scaled and capped logits, too
        finite = theirs.isfinite()
        same_holes = torch.equal(ours.isfinite(), finite)
        a, b = (torch.where(finite, x.double(), 0.0) for x in (ours, theirs))
        worst = (a - b).abs().amax(-1)
        spread = (a - b).square().mean().sqrt()
        if not (
            same_holes
            and bool((worst <= 4 * eps * b.abs().amax(-1)).all())
            and bool(spread <= eps * b.square().mean().sqrt())
        ):
            most, largest = worst.max().item(), b.abs().max().item()
            msg = (
                f"{name} makes its logits otherwise than by output embedding, scale {self.scale:g} and softcap "
                f"{self.softcap}: they differ by up to {most:.3g}, where the largest is {largest:.3g}"
            )
            raise ValueError(msg)


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
