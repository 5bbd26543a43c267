"""Other ways to keep arrays on disk, each with the two payloads: raw (u32 ids and fp16 log-probabilities) and packed.

A store is written once, sample by sample, and then gives back whole samples, or ranges of tokens where it can. What
comes back is left as it is stored: to widen fp16 or to unpack is not charged to the stores.
"""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Store(NamedTuple):
    """One way to keep samples."""

    write: Callable[[Path, Sequence[np.ndarray]], None]  # rows (tokens, bytes per token) uint8 of each sample
    open: Callable[[Path], Callable[[int, int, int], Any]]  # -> read(sample, start, stop)
    package: str = ""


def _memmap_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    np.concatenate(samples).tofile(path / "rows.bin")


def _memmap_open(path: Path) -> Callable[[int, int, int], Any]:
    tokens, width = np.load(path / "shape.npy")
    rows = np.memmap(path / "rows.bin", np.uint8, "r").reshape(-1, width)
    return lambda i, start, stop: np.array(rows[i * tokens + start : i * tokens + stop])


def _lmdb_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    import lmdb

    with lmdb.open(str(path / "lmdb"), map_size=1 << 34) as store, store.begin(write=True) as transaction:
        for i, rows in enumerate(samples):
            transaction.put(b"%08d" % i, rows.tobytes())


def _lmdb_open(path: Path) -> Callable[[int, int, int], Any]:
    import lmdb

    store = lmdb.open(str(path / "lmdb"), readonly=True, lock=False)
    transaction = store.begin(buffers=True)
    width = int(np.load(path / "shape.npy")[1])

    def read(i: int, start: int, stop: int) -> Any:
        return np.array(np.frombuffer(transaction.get(b"%08d" % i)[start * width : stop * width], np.uint8))

    return read


def _arrow_table(samples: Sequence[np.ndarray]) -> Any:
    import pyarrow as pa

    return pa.table({"rows": pa.array([rows.tobytes() for rows in samples], pa.large_binary())})


def _arrow_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    import pyarrow as pa

    table = _arrow_table(samples)
    with pa.OSFile(str(path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def _arrow_open(path: Path) -> Callable[[int, int, int], Any]:
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path / "rows.arrow")))
    width = int(np.load(path / "shape.npy")[1])

    def read(i: int, start: int, stop: int) -> Any:
        buffer = reader.get_batch(i).column(0)[0].as_buffer()
        return np.array(np.frombuffer(buffer[start * width : stop * width], np.uint8))

    return read


def _parquet_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    import pyarrow.parquet as pq

    pq.write_table(
        _arrow_table(samples), path / "rows.parquet", compression="zstd", row_group_size=1, use_dictionary=False
    )


def _parquet_open(path: Path) -> Callable[[int, int, int], Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path / "rows.parquet")
    width = int(np.load(path / "shape.npy")[1])

    def read(i: int, start: int, stop: int) -> Any:
        buffer = file.read_row_group(i).column(0)[0].as_buffer()
        return np.frombuffer(buffer, np.uint8)[start * width : stop * width]

    return read


def _safetensors_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({f"{i:08d}": rows for i, rows in enumerate(samples)}, path / "rows.safetensors")


def _safetensors_open(path: Path) -> Callable[[int, int, int], Any]:
    from safetensors import safe_open

    file = safe_open(path / "rows.safetensors", "np").__enter__()
    return lambda i, start, stop: file.get_slice(f"{i:08d}")[start:stop]


def _hdf5_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    import h5py

    with h5py.File(path / "rows.h5", "w") as file:
        for i, rows in enumerate(samples):
            file.create_dataset(f"{i:08d}", data=rows, chunks=(min(128, len(rows)), rows.shape[1]), fletcher32=True)


def _hdf5_open(path: Path) -> Callable[[int, int, int], Any]:
    import h5py

    file = h5py.File(path / "rows.h5")
    return lambda i, start, stop: file[f"{i:08d}"][start:stop]


def _streaming() -> Any:
    """mosaicml-streaming, without torchvision.

    It imports torchvision for data sets of pictures, which are not used here, and torchvision's wheel does not load
    beside a CPU build of torch.
    """
    names = {"torchvision.datasets": "VisionDataset", "torchvision.transforms.functional": "to_tensor"}
    if "streaming" not in sys.modules:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", *names):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)  # others look for it
        for name, member in names.items():
            setattr(sys.modules[name], member, object)
    import streaming

    return streaming


def _mds_write(path: Path, samples: Sequence[np.ndarray]) -> None:
    with _streaming().MDSWriter(out=str(path / "mds"), columns={"rows": "ndarray:uint8"}) as writer:
        for rows in samples:
            writer.write({"rows": rows})


def _mds_open(path: Path) -> Callable[[int, int, int], Any]:
    data = _streaming().StreamingDataset(local=str(path / "mds"), batch_size=1)
    return lambda i, start, stop: data[i]["rows"][start:stop]


STORES = {
    "memmap": Store(_memmap_write, _memmap_open),
    "LMDB": Store(_lmdb_write, _lmdb_open, "lmdb"),
    "Arrow IPC": Store(_arrow_write, _arrow_open, "pyarrow"),
    "Parquet zstd": Store(_parquet_write, _parquet_open, "pyarrow"),
    "safetensors": Store(_safetensors_write, _safetensors_open, "safetensors"),
    "HDF5 fletcher32": Store(_hdf5_write, _hdf5_open, "h5py"),
    "MDS": Store(_mds_write, _mds_open, "mosaicml-streaming"),
}


def write(store: Store, path: Path, samples: Sequence[np.ndarray]) -> None:
    """Makes a store anew."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    np.save(path / "shape.npy", np.array(samples[0].shape))
    store.write(path, samples)
