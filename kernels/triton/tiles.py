"""Tiles, warps and splits of the kernels: the one table of what was chosen for which work and which processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Columns that a program takes at a time, and the warps that share them."""

    columns: int
    warps: int


#: By operator, architecture ("sm_80", "sm_90", "sm_100", "gfx942"; "interpreter" on the CPU) and work. An architecture
#: that is not listed takes the nearest older one of its maker. ``python -m bench.gpu --autotune`` finds another one.
#:
#: The work of a dense call is named after what it keeps in registers per column: "light" is forward KL or cross-entropy
#: alone, "other" one other divergence, "many" a mixture or an ensemble, "capped" any of them over logits that a softcap
#: or a scale makes of what is stored, and a mixture with the total variation, which compares logits, too. "kept" is
#: sparse targets, each of whose columns is looked for in the whole of its tile; "kept many" has more than FEW_KEPT of
#: them, which few warps would spill.
TABLE_FILE = Path(__file__).with_name("tiles.json")
TABLE: dict[str, dict[str, dict[str, Tile]]] = {
    operator: {arch: {work: Tile(*tile) for work, tile in row.items()} for arch, row in rows.items()}
    for operator, rows in json.loads(TABLE_FILE.read_text()).items()
}

#: Programs per processor below which a row is split, and the most splits of a row.
PROGRAMS_PER_PROCESSOR = 2
MOST_SPLITS = 64

FEW_KEPT = 1024

#: Kept columns of a row of sparse targets, which one program holds in registers.
MOST_KEPT = 4096
#: The same of packed targets, whose entries it unpacks there; of more, the entries are unpacked into memory first.
MOST_PACKED = 1024


def architecture(device: torch.device) -> str:
    """The row of the table that serves a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(name[3:]) for name in TABLE["dense"] if name.startswith("sm_"))
    return f"sm_{max([k for k in known if k <= 10 * major + minor], default=known[0])}"


def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; the interpreter is taken for a small device, so that rows split."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def dense_tile(device: torch.device, work: str, columns: int) -> Tile:
    """The tile for rows of this many columns, no wider than the row needs."""
    tile = TABLE["dense"][architecture(device)][work]
    width = max(128, 1 << (columns - 1).bit_length())
    return tile if width >= tile.columns else Tile(width, max(1, tile.warps * width // tile.columns))


def select_tile(device: torch.device, chunk: int, columns: int) -> Tile:
    """The tile of whole chunks for rows of this many columns, no wider than the row needs."""
    tile = TABLE["select"][architecture(device)]["scan"]
    width = max(chunk, min(tile.columns, max(128, 1 << (columns - 1).bit_length())))
    return Tile(width, max(1, min(tile.warps, tile.warps * width // tile.columns)))


def dense_splits(device: torch.device, rows: int, columns: int, tile: Tile) -> int:
    """Programs that share a row: a function of shapes and of the device, so that results do not depend on timing.

    A power of two, as each number is a kernel of its own.
    """
    if rows >= processors(device):
        return 1
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // max(rows, 1))
    tiles = -(-columns // tile.columns)
    return min(1 << (wanted - 1).bit_length(), 1 << (tiles.bit_length() - 1), MOST_SPLITS)
