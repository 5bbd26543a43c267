from collections.abc import Sequence

class View:
    def __init__(self, data: int, dtype: str, shape: Sequence[int], strides: Sequence[int]) -> None: ...

def dense(
    *,
    passes: str,
    student: View,
    teachers: Sequence[View],
    teacher_weights: View | None = ...,
    labels: View | None = ...,
    counted: View | None = ...,
    temperature: float,
    names: Sequence[str],
    weights: Sequence[float],
    parameters: Sequence[float],
    mix_logits: bool,
    columns: int,
    label_smoothing: float,
    soft: View | None = ...,
    hard: View | None = ...,
    z2: View | None = ...,
    dsoft_dtemperature: View | None = ...,
    stats: View | None = ...,
    grad: View | None = ...,
    c_soft: View | None = ...,
    c_hard: View | None = ...,
    c_z: View | None = ...,
    logit_sum: View | None = ...,
    values: View | None = ...,
    values_with_dtemperature: bool = ...,
    kept_ids: View | None = ...,
    kept_values: View | None = ...,
    kept_per_row: View | None = ...,
    kept_columns: int = ...,
    tail_rule: str = ...,
    threads: int,
) -> None: ...
def select(
    *,
    logits: View,
    method: str,
    k: int,
    least: int,
    p: float,
    temperatures: Sequence[float],
    seed: int,
    first_token: int,
    ids: View,
    logprobs: View,
    lse: View,
    k_eff: View,
    mass: View | None = ...,
    neg_entropy: View | None = ...,
    threads: int,
) -> None: ...
def scale(data: View, factor: float, threads: int) -> None: ...
def triad(a: View, b: View, out: View, threads: int) -> None: ...
def advise_huge_pages(data: View) -> None: ...
def sort_rows(x: View, values: View, order: View | None, threads: int) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
