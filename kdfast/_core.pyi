from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from kdfast.cache.error import CacheError
from kdfast.cache.keys import Key

class View:
    def __init__(
        self, data: int, dtype: str, shape: Sequence[int], strides: Sequence[int], storage_bytes: int
    ) -> None: ...

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
    scales: list[float] = ...,
    softcaps: list[float] = ...,
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
def unpack(
    *,
    data: View,
    offset: View,
    top: View,
    k_eff: View | None,
    vocab_size: int,
    grid: int,
    ids: View,
    logprobs: View,
    threads: int,
) -> None: ...

class CacheHeader(TypedDict):
    vocab_size: int
    temperatures: list[float]
    shift: int
    metadata: str
    crc: int

class CacheTensors:
    def __init__(
        self,
        ids: View,
        *,
        logprobs: View | None = ...,
        mass: View | None = ...,
        lse: View | None = ...,
        k_eff: View | None = ...,
        gold: View | None = ...,
        neg_entropy: View | None = ...,
    ) -> None: ...

class CacheEntry:
    @property
    def tokens(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def tier(self) -> str: ...
    @property
    def ragged(self) -> bool: ...
    @property
    def gold(self) -> bool: ...
    @property
    def token_hash(self) -> bytes | None: ...
    @property
    def frame_bytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def shard(self) -> int: ...

class CacheReader:
    def __init__(self, path: str, damaged: bool, open_files: int = ...) -> None: ...
    @property
    def header(self) -> CacheHeader: ...
    @property
    def damage(self) -> list[CacheError]: ...
    @property
    def shards(self) -> list[tuple[str, int, int, int, int, bool]]: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: str) -> bool: ...
    @property
    def indexed_shards(self) -> int: ...
    def keys(self) -> CacheKeys: ...
    def find(self, key: str) -> CacheEntry: ...
    def details(self, entry: CacheEntry, files: Mapping[int, str] = ...) -> tuple[float, int | None, int, int, int]: ...
    def verify_shard(self, shard: int, path: str, threads: int) -> list[CacheError]: ...
    def check_shard(self, shard: int, path: str, threads: int) -> None: ...
    def select(self, selectors: Iterable[object], key_text: Callable[[object], str]) -> CacheSelection: ...

class CachePackedData:
    def __len__(self) -> int: ...
    @property
    def grid(self) -> int: ...

class CacheMemory:
    def __init__(self, bytes: int) -> None: ...

class CacheKeys:
    def next(self, most: int) -> list[str]: ...

class CacheSelection:
    def __len__(self) -> int: ...
    def key(self, i: int) -> str: ...
    def range(self, i: int) -> tuple[int, int]: ...
    def entry(self, i: int) -> CacheEntry: ...
    @property
    def shards(self) -> set[int]: ...
    @property
    def groups(self) -> list[tuple[int, str, bool, bool, list[int], list[int]]]: ...
    @property
    def bytes(self) -> tuple[int, int]: ...
    def read(
        self, tensors: Sequence[tuple[int, int, int, int, int, int]], threads: int, files: Mapping[int, str] = ...
    ) -> None: ...
    def pack(
        self, tensors: Sequence[tuple[int, int, int, int, int, int]], threads: int, files: Mapping[int, str] = ...
    ) -> list[tuple[int, CachePackedData]]: ...

class CacheWriter:
    def __init__(
        self,
        *,
        path: str,
        vocab_size: int,
        temperatures: Sequence[float],
        shift: int,
        metadata: str,
        tier: str,
        grid: int,
        block_tokens: int,
        shard_bytes: int,
        commit_bytes: int,
        queue_bytes: int,
        threads: int,
        keep_duplicates: bool,
    ) -> None: ...
    def write(
        self,
        *,
        key: str,
        method: str,
        parameter: float,
        seed: int | None,
        token_hash: bytes | None,
        tensors: CacheTensors,
        temperatures: int,
    ) -> bool: ...
    def __contains__(self, key: str) -> bool: ...
    def missing(self, keys: Iterable[Key], key_text: Callable[[Key], str]) -> list[Key]: ...
    def commit(self) -> int: ...
    def close(self) -> int: ...
    @property
    def damage(self) -> list[CacheError]: ...
    @property
    def id(self) -> int: ...
    @property
    def waiting_bytes(self) -> int: ...

def cache_update_index(path: str) -> None: ...
def cache_verify(path: str, threads: int) -> tuple[int, int, int, list[CacheError]]: ...
def cache_repair(path: str) -> tuple[int, list[CacheError], list[str], list[str]]: ...
def cache_merge(
    sources: Sequence[str], destination: str, shard_bytes: int, keep_duplicates: bool
) -> tuple[int, int]: ...
