"""What a divergence is called, which parameters it takes, and how a mixture of them is written down."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

#: Each divergence with its own parameters; ``None`` marks one that has no default and must be given.
PARAMETERS: dict[str, dict[str, float | None]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "skew_forward_kl": {"lam": 0.1},
    "skew_reverse_kl": {"lam": 0.1},
    "tvd": {},
    "alpha_div": {"a": None},
    "hellinger": {},
}

#: A KL that a parameter on the edge of its range would turn the divergence into, to name in the error.
_LIMITS = {
    ("jsd", 0.0): 'use "forward_kl" (jsd with normalize=True tends to it)',
    ("jsd", 1.0): 'use "reverse_kl" (jsd with normalize=True tends to it)',
    ("skew_forward_kl", 0.0): 'use "forward_kl"',
    ("skew_reverse_kl", 0.0): 'use "reverse_kl"',
    ("alpha_div", 0.0): 'use "reverse_kl", its limit',
    ("alpha_div", 1.0): 'use "forward_kl", its limit',
}


class Term(NamedTuple):
    """One summand of a divergence: ``weight * D_name(parameter)``."""

    name: str
    weight: float
    parameter: float  # beta, lam or a; 0 where the divergence has none


@dataclass(frozen=True)
class Divergence:
    r"""A divergence D(q, p) between teacher q and student p, with its parameters.

    ========================  ===================================================  ==========================
    name                      D                                                    parameter
    ========================  ===================================================  ==========================
    ``forward_kl``            sum q (log q - log p)
    ``reverse_kl``            sum p (log p - log q)
    ``jsd``                   beta KL(q, m) + (1 - beta) KL(p, m),                 ``beta`` = 0.5
                              m = beta q + (1 - beta) p
    ``skew_forward_kl``       KL(q, lam q + (1 - lam) p)                           ``lam`` = 0.1
    ``skew_reverse_kl``       KL(p, (1 - lam) q + lam p)                           ``lam`` = 0.1
    ``tvd``                   1/2 sum abs(p - q)
    ``alpha_div``             (1 - sum q^a p^(1-a)) / (a (1 - a))                  ``a``, no default
    ``hellinger``             1 - sum sqrt(p q)
    ========================  ===================================================  ==========================

    Values are in nats (tvd, alpha_div and hellinger have no unit). Every one is 0 where q = p.

    Args:
        name: one of the names above.
        beta: weight of the teacher in ``jsd``, 0 < beta < 1.
        lam: share of the first argument in the mixture of a skewed KL, 0 < lam < 1.
        a: order of ``alpha_div``, 0 < a < 1.
        normalize: ``jsd`` only: divide by beta (1 - beta), so that beta -> 0 is forward and beta -> 1 reverse KL.

    Raises:
        ValueError: an unknown name, a parameter of another divergence, or one out of range.

    Source:
        Lin, "Divergence measures based on the Shannon entropy" (jsd); Ko et al., arXiv 2402.03898 (skewed KL);
        Amari, "Differential-geometrical methods in statistics" (alpha divergence).

    Example:
        >>> Divergence("jsd", beta=0.3).terms()
        (Term(name='jsd', weight=1.0, parameter=0.3),)
    """

    name: str
    beta: float | None = None
    lam: float | None = None
    a: float | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.name not in PARAMETERS:
            msg = f"divergence: unknown name {self.name!r}; expected one of {', '.join(PARAMETERS)}"
            raise ValueError(msg)
        own = PARAMETERS[self.name]
        for key in ("beta", "lam", "a"):
            value = getattr(self, key)
            if key not in own:
                if value is not None:
                    takes = f"takes {', '.join(own)}" if own else "takes no parameter"
                    msg = f"divergence {self.name!r} got {key}={value!r}, but it {takes}"
                    raise ValueError(msg)
                continue
            if value is None:
                value = own[key]
                if value is None:
                    msg = f'divergence {self.name!r} needs {key}: pass kdfast.Divergence("{self.name}", {key}=0.5)'
                    raise ValueError(msg)
            number = float(value) if isinstance(value, (int, float, numbers.Real)) else None
            if number is None or not 0.0 < number < 1.0:
                limit = None if number is None else _LIMITS.get((self.name, number))
                msg = f"divergence {self.name!r}: {key} must lie strictly between 0 and 1, got {value!r}"
                raise ValueError(f"{msg}: {limit}" if limit else msg)
            object.__setattr__(self, key, number)
        if self.normalize and self.name != "jsd":
            msg = f"divergence {self.name!r} got normalize=True, which only jsd takes"
            raise ValueError(msg)

    def terms(self) -> tuple[Term, ...]:
        """The divergence as weighted terms, which is what a backend is given."""
        parameter = next((v for v in (self.beta, self.lam, self.a) if v is not None), 0.0)
        weight = 1.0 / (parameter * (1.0 - parameter)) if self.normalize else 1.0
        return (Term(self.name, weight, parameter),)


Divergence.__module__ = "kdfast"  # where it is for users, and for what they pickle


DivergenceLike: TypeAlias = str | Divergence | Mapping[str | Divergence, float]


def divergence_terms(divergence: DivergenceLike) -> tuple[Term, ...]:
    """Normalise what a caller may pass as ``divergence`` to weighted terms.

    Args:
        divergence: a name, a :class:`Divergence`, or a mapping of either to its weight (>= 0, finite).

    Raises:
        TypeError: none of these.
        ValueError: an unknown name, a bad parameter, a negative or non-finite weight, or no weight above 0.

    Example:
        >>> [t.weight for t in divergence_terms({"forward_kl": 0.7, "reverse_kl": 0.3})]
        [0.7, 0.3]
    """
    if isinstance(divergence, str):
        return Divergence(divergence).terms()
    if isinstance(divergence, Divergence):
        return divergence.terms()
    if not isinstance(divergence, Mapping):
        msg = (
            "divergence must be a name, a kdfast.Divergence or a mapping of either to weights, "
            f"got {type(divergence).__name__}"
        )
        raise TypeError(msg)
    terms = []
    for key, weight in divergence.items():
        if not isinstance(weight, (int, float, numbers.Real)) or not math.isfinite(weight) or weight < 0:
            msg = f"divergence: the weight of {key!r} must be a finite number >= 0, got {weight!r}"
            raise ValueError(msg)
        (term,) = divergence_terms(key)
        if weight > 0:
            terms.append(term._replace(weight=term.weight * float(weight)))
    if not terms:
        msg = f"divergence: a mixture needs at least one weight above 0, got {dict(divergence)!r}"
        raise ValueError(msg)
    return tuple(terms)
