"""Seeds for the fuzzer: every part of the golden caches, by itself. `python csrc/fuzz/make_corpus.py`."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "tests" / "golden" / "cache-v1"
HEADER, SHARD, FRAME, INDEX, JOURNAL, TAIL, BLOCK, MODEL, COMPACT = range(9)


def seeds(folder: Path) -> list[bytes]:
    """The parts of one cache, each behind the byte that names it."""
    out = []
    header = (folder / "cache.header").read_bytes()
    out.append(bytes([HEADER]) + header)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.suffix == ".journal":
            out.append(bytes([JOURNAL]) + content)
        if file.suffix not in (".shard", ".open"):
            continue
        out.append(bytes([SHARD]) + content[len(header) : len(header) + 32])
        if file.suffix == ".shard":
            _, index_offset, index_bytes = struct.unpack_from("<3Q", content, len(content) - 32)
            out += [bytes([TAIL]) + content[-32:], bytes([INDEX]) + content[index_offset : index_offset + index_bytes]]
        at = len(header) + 32
        models = {}
        while content[at : at + 4] in (b"KDFR", b"KDFM"):
            if content[at : at + 4] == b"KDFM":
                payload_bytes, frame_bytes = struct.unpack_from("<IQ", content, at + 4)
                out.append(bytes([MODEL]) + content[at : at + 56])
                models[at] = content[at + 56 : at + 56 + payload_bytes]
                at += frame_bytes
                continue
            header_bytes, frame_bytes = struct.unpack_from("<IQ", content, at + 4)
            frame = content[at : at + header_bytes]
            out.append(bytes([FRAME]) + frame)
            out += blocks(header, frame, content[at + header_bytes : at + frame_bytes], models)
            at += frame_bytes
    return out


def blocks(header: bytes, frame: bytes, content: bytes, models: dict[int, bytes]) -> list[bytes]:
    """Blocks behind the six bytes of their layout, where that can say it, and those behind their model."""
    (vocab_size,), (temperatures,) = struct.unpack_from("<I", header, 16), header[20:21]
    tokens, kept, _, block_tokens, codec, method, grid, flags = struct.unpack_from("<IHHHBBBB", frame, 64)
    (draws,) = struct.unpack_from("<d", frame, 40)
    count = (tokens + block_tokens - 1) // block_tokens
    lengths = [struct.unpack_from("<I", frame, len(frame) - 8 - 8 * (count - i))[0] for i in range(count)]
    drawn = codec == 3
    out, at = [], 0
    for i, length in enumerate(lengths):
        block, at = content[at : at + length], at + length
        n = min(block_tokens, tokens - i * block_tokens)
        first = drawn | (method in (1, 3)) << 1 | (flags & 1) << 2 | (flags >> 1 & 1) << 3
        first |= (not drawn and temperatures > 1) << 4
        layout = [first, (vocab_size - 1).bit_length(), kept - 1, grid - 2, max(0, int(draws) - 1), n - 1]
        if max(layout) >= 256:
            continue
        if codec == 2:
            (model,) = struct.unpack_from("<Q", frame, 80)
            lengths_of_model = struct.pack("<HHB", vocab_size, len(models[model]), (temperatures > 1) << 4)
            out.append(bytes([COMPACT]) + lengths_of_model + models[model] + bytes(layout) + block)
        else:
            out.append(bytes([BLOCK, *layout]) + block)
    return out


if __name__ == "__main__":
    corpus = HERE / "corpus"
    corpus.mkdir(exist_ok=True)
    for old in corpus.iterdir():
        old.unlink()
    for folder in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        for seed in seeds(folder):
            if len(seed) <= 4096:
                (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
