"""What a step of each path costs in memory and traffic, by arithmetic: nothing is run.

``kdfast plan`` prints it and docs/large-vocabulary.md derives it. All costs are beside the hidden states and the
models' weights, which every path has.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.ops.head import operators as head

#: Full-size fp32 tensors that the eager formula of forward KL and cross-entropy holds at its peak, as measured by
#: ``kdfast bench``; the compiled one holds 2 of fp32 logits.
EAGER_COPIES = 5


@dataclass(frozen=True)
class Cost:
    """One path's cost of a step, gradients included."""

    path: str
    memory: int  # bytes at the peak, logits and gradients included
    traffic: int  # bytes that the loss moves in memory, one read and one write of a row in cache counting once
    products: int  # matrix products of 2 N V H operations
    remark: str


def plan(*, tokens: int, vocab: int, hidden: int, kept: int = 64, itemsize: int = 2, device: str = "cpu") -> list[Cost]:
    """The costs of every path, the leanest last.

    Args:
        tokens: N of one step.
        vocab: V.
        hidden: H of the student; the teacher's logits are taken to come from a head of the same size.
        kept: K of sparse targets.
        itemsize: bytes of an element: 4 for fp32, 2 for bf16 and fp16.
        device: "cpu" or "cuda", which have different chunks.

    Returns:
        One :class:`Cost` per path.

    Raises:
        ValueError: a size below 1, or another device.

    Example:
        >>> costs = plan(tokens=8192, vocab=128256, hidden=4096, itemsize=2, device="cuda")
        >>> [round(c.memory / 2**30, 1) for c in costs if c.path.startswith(("eager", "distill_loss(LMHead, LMHead"))]
        [24.5, 3.9]
    """
    sizes = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "kept": kept, "itemsize": itemsize}
    for name, value in sizes.items():
        if value < 1:
            msg = f"{name} must be >= 1, got {value}"
            raise ValueError(msg)
    if device not in head.CHUNK_BYTES:
        msg = f"device must be one of {', '.join(head.CHUNK_BYTES)}, got {device!r}"
        raise ValueError(msg)
    logits, weight = tokens * vocab * itemsize, vocab * hidden
    entries = tokens * (kept * 8 + 8)
    # The weight's gradient is summed in fp32; in 16 bits there is its final form too, and on the CPU a chunk's product.
    gradient = 4 * weight + (0 if itemsize == 4 else itemsize * weight)

    def chunk(heads: int) -> int:
        per_token = heads * vocab * itemsize
        return head.chunk_rows(tokens, per_token, head.CHUNK_BYTES[device]) * per_token

    stored = itemsize * weight  # the gradient of a weight whose logits are stored
    return [
        Cost(
            "eager, stored logits",
            2 * logits + EAGER_COPIES * tokens * vocab * 4 + stored,
            2 * logits + 3 * EAGER_COPIES * tokens * vocab * 4,
            4,
            f"{EAGER_COPIES} full-size copies in fp32",
        ),
        Cost("distill_loss(logits, logits)", 3 * logits + stored, 3 * logits, 4, "one gradient of the logits"),
        Cost("the same, overwrite_logits=True", 2 * logits + stored, 3 * logits, 4, "the gradient replaces logits"),
        Cost("distill_loss(logits, SparseTargets)", 2 * logits + entries + stored, 2 * logits, 3, f"{kept} of V kept"),
        Cost("distill_loss(LMHead, LMHead)", chunk(2) + gradient, 7 * logits, 4, "one chunk of logits at a time"),
        Cost("distill_loss(LMHead, SparseTargets)", chunk(1) + gradient + entries, 5 * logits, 3, f"{kept} of V kept"),
    ]
