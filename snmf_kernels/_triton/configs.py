"""Tiles of every kernel, by dtype and size class: one table, compiled as a whole by tests/aot.py.

Chosen for what compilation shows (no spills on sm_80, sm_90, sm_100 and gfx942; tests/test_aot.py) and for the reasons
beside each, not yet tuned on a device: benchmarks/gpu_tune.py does that and rewrites this file. ``precision``
is Triton's ``input_precision`` of products: ``"ieee"`` means float32 multiply-adds, without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SweepConfig:
    """Tile of a sweep over Y: features of a program or of one block, features of one step of its sums, tokens."""

    block_k: int
    block_j: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str


@dataclass(frozen=True)
class BlockConfig:
    """A kernel that goes over one axis in blocks."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class SelectConfig:
    """A search in a column: the longest one that registers hold as a whole, and rows at a time of all else."""

    whole: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class ColumnConfig(SelectConfig):
    """``column_descent``: also changed rows, and features of their residual, at a time. Loads stay behind barriers."""

    block_c: int
    block_k: int
    num_stages: int = 1


@dataclass(frozen=True)
class GatherConfig:
    """Products with the kept rows of A: kept entries of a feature at a time, and tokens of a program."""

    block_c: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class DenseConfig:
    """Matrix products with a tile of A: features, neurons and tokens of it.

    ``how``: ``"parts"``, the other operand as three bfloat16 that add up to its float32, on tensor cores; ``"ieee"``
    multiply-adds; or ``"tf32"``, both operands rounded to 11 bits, on tensor cores.
    """

    block_k: int
    block_d: int
    block_n: int
    num_warps: int
    num_stages: int
    how: str


@dataclass(frozen=True)
class PassConfig:
    """The pass over A as a whole.

    Attributes:
        max_k: most features it takes.
        tile_bytes: what a tile of A may have to stay in cache, and
        busy_programs: of a sweep that keep the device busy; a tile has tokens for so many, even if it leaves the cache.
        sweeps: tiles of its sweeps, by dtype and whether they are multiplicative.
    """

    max_k: int
    tile_bytes: int
    busy_programs: int
    sweeps: dict[tuple[torch.dtype, bool], SweepConfig]


# By dtype, and by whether k needs more than one row of tiles. Large ones have more products for each load; in float64
# the accumulators are twice as wide, and larger tiles spill.
UPDATE: dict[tuple[torch.dtype, bool], SweepConfig] = {
    (torch.float32, False): SweepConfig(32, 16, 64, 4, 2, "ieee"),
    (torch.float32, True): SweepConfig(64, 16, 128, 8, 3, "ieee"),
    (torch.float64, False): SweepConfig(32, 16, 32, 4, 2, "ieee"),
    (torch.float64, True): SweepConfig(32, 16, 32, 4, 2, "ieee"),
}
# Features follow one another, so that a program waits for latencies: few tokens and one warp to a program, whose row
# sums then need no barrier, and many programs to a multiprocessor. No stages: loads must stay behind the barriers.
DESCENT: dict[torch.dtype, SweepConfig] = {
    torch.float32: SweepConfig(16, 32, 32, 1, 1, "ieee"),
    torch.float64: SweepConfig(16, 16, 32, 1, 1, "ieee"),
}
# A column of 14,336 is read once and searched in registers, 32 keys of a float32 to a thread; of more keys, or of
# larger blocks afterwards, some would spill.
SELECT: dict[torch.dtype, SelectConfig] = {
    torch.float32: SelectConfig(16384, 2048, 16),
    torch.float64: SelectConfig(8192, 2048, 16),
}
# A program has its multiprocessor to itself (there is one to a fit), so as many warps as registers allow, and many
# loads of the residual under way, whose latency is what an update takes.
COLUMNS: dict[torch.dtype, ColumnConfig] = {
    torch.float32: ColumnConfig(16384, 2048, 16, 128, 64),
    torch.float64: ColumnConfig(8192, 2048, 16, 64, 64),
}
# 16 KB of float32 to a program: enough to hide one load's latency.
COPY = BlockConfig(4096, 4)
# By the working dtype. As many gathered values in flight as registers allow, rows of at least 128 bytes each.
GATHER: dict[torch.dtype, GatherConfig] = {
    torch.float32: GatherConfig(16, 128, 4),
    torch.float64: GatherConfig(16, 64, 4),
}
# By the working dtype and, in float32, whether A is bfloat16 or TF32 is allowed. Products of a bfloat16 A with the
# three parts of a float32 are exact, so that tensor cores give float32 accuracy at a third of their rate; float16 has
# too little range for such parts, and float32 would take six products. Steps of 32 neurons leave registers for the
# parts. Without tensor cores the accumulators are what fits registers.
PRODUCT: dict[tuple[torch.dtype, str], DenseConfig] = {
    (torch.float32, "bf16"): DenseConfig(64, 32, 64, 4, 3, "parts"),
    (torch.float32, "exact"): DenseConfig(64, 16, 64, 4, 2, "ieee"),
    (torch.float32, "tf32"): DenseConfig(64, 32, 64, 4, 3, "tf32"),
    (torch.float64, "exact"): DenseConfig(32, 16, 32, 4, 2, "ieee"),
}
# Likewise; here a program owns block_k x block_d sums and walks over tokens.
ACCUMULATE: dict[tuple[torch.dtype, str], DenseConfig] = {
    (torch.float32, "bf16"): DenseConfig(64, 64, 32, 4, 3, "parts"),
    (torch.float32, "exact"): DenseConfig(64, 64, 16, 4, 3, "ieee"),
    (torch.float32, "tf32"): DenseConfig(64, 64, 32, 4, 3, "tf32"),
    (torch.float64, "exact"): DenseConfig(32, 32, 16, 4, 2, "ieee"),
}
# The share of kept rows from which a dense product should take less time than gathering, by whether A is bfloat16.
# Gathering is bound by the second-level cache (5 TB/s on an H100), dense products by a third of 989 TFLOP/s, or by half
# of 67 of float32 multiply-adds.
DENSE_FROM = {True: 1 / 32, False: 1 / 16}
# So many programs at least, twice the multiprocessors of an H100, if necessary by splitting the neurons.
PROGRAMS = 264
# The residual is measured once, after the last iteration, so that float32 multiply-adds will do.
RESIDUAL: dict[torch.dtype, DenseConfig] = {
    torch.float32: DenseConfig(16, 64, 64, 4, 1, "ieee"),
    torch.float64: DenseConfig(16, 32, 32, 4, 1, "ieee"),
}
# A tile of A beside its Y, the parts of ZᵀA and A Yᵀ leaves room in the 40 to 50 MB of an A100's or H100's second
# level, and is read from memory once. But features follow one another in a sweep: at d = 14,336 such a tile has 576
# tokens for 18 programs, which take as long as 1,056 (eight to each multiprocessor of an H100) would, some 20 us a
# sweep by the count of its instructions, and reading the tile again takes 5. So a tile has tokens for those. Up to
# 256 features y and ZᵀA of one program's tokens (64 KB) fit the first level; with more it is still better than blocks
# of few tokens.
PASS = PassConfig(
    max_k=1024,
    tile_bytes=16 << 20,
    busy_programs=1056,
    sweeps={
        (torch.float32, False): DESCENT[torch.float32],
        (torch.float64, False): DESCENT[torch.float64],
        # All rows of the tokens belong to one program: few tokens, and a second warp for twice the products.
        (torch.float32, True): SweepConfig(16, 32, 32, 2, 1, "ieee"),
        (torch.float64, True): SweepConfig(32, 16, 32, 4, 1, "ieee"),
    },
)
