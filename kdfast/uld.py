"""Universal logit distillation: a loss between vocabularies that have nothing in common."""

from __future__ import annotations

from torch import Tensor

from kdfast.ops.eager import in_graphs
from kdfast.ops.uld.autograd import token_losses
from kdfast.spec import reference
from kdfast.spec.problem import Reduction, build_problem, check_plain_logits
from kdfast.spec.reduction import keep, token_weights, weighted


@in_graphs
def uld_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation: distance of sorted probabilities, for models whose tokenizers differ.

    With p = softmax(student / temperature) and q = softmax(teacher / temperature), both sorted descending and the
    shorter one padded with probability 0, per token::

        loss = sum_j |p_j - q_j|        in [0, 2]

    Tokens must be aligned first: row i of both must predict what follows the same piece of text, see
    :mod:`kdfast.integrations.alignment`. The loss compares how certain two models are, never of what, so it is an
    addition to a loss on labels and cannot replace one. There is no factor temperature^2: this gradient falls with
    1 / temperature.

    The gradient goes through the order of the student's logits: it is taken at the order they have, equal logits are
    ranked by column, and sign(0) = 0. The teacher is detached.

    Args:
        student: (..., V) floating point logits; fp32 arithmetic, fp64 for fp64.
        teacher: (..., U) floating point logits of the same tokens; U and V are independent.
        temperature: > 0, a float or a 0-d tensor, which may require grad.
        weights: (...) per token; 0 drops the token, whatever its logits hold.
        reduction: "mean": sum(w * loss) / sum(w) over counted tokens; "sum"; "none": w * loss per token.
        num_items: replaces the denominator of the mean, as in :func:`kdfast.distill_loss`.

    Returns:
        The loss, fp32 (fp64 for an fp64 student): 0-d, or (...) with ``reduction="none"``.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant.

    Source:
        Boizard et al., "Towards cross-tokenizer distillation: the universal logit distillation loss for LLMs",
        arXiv 2402.12030.

    Example:
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0, -3.0, -4.0]])
        >>> loss = uld_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), tuple(student.grad.shape)
        (0.0122, (1, 3))
    """
    for name, value in (("student", student), ("teacher", teacher)):
        check_plain_logits(name, value)
    problem = build_problem(
        student,
        teacher,
        temperature=temperature,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
        vocab="truncate",  # sizes may differ; nothing is cut here
    )
    assert isinstance(problem.student, Tensor)
    assert isinstance(problem.teachers[0], Tensor)
    reference._check_values(problem, problem.student)
    loss = keep(token_losses(problem.student, problem.teachers[0], problem), problem.counted)
    return weighted(token_weights(problem), loss, reduction)
