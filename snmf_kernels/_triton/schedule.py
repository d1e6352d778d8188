"""Which launches a pass over A is made of, in their order: a plan that the launcher follows and that tests can read.

A is taken in *tiles*, runs of tokens. A tile that fits the second-level cache is read from memory once: every launch
after the first finds it there. With many neurons such a tile has too few tokens to keep a GPU busy during sweeps; it is
made larger then, and read twice (``PassConfig.busy_programs``). Nothing here touches a device.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .configs import DenseConfig, SweepConfig


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, on which tokens, and what it reads or adds to, by name, in bytes."""

    kernel: str
    tokens: slice
    touches: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Plan:
    """A pass.

    Attributes:
        width: tokens of a tile (the last one may be shorter).
        splits, chunk: parts of the neurons in the product ``ZᵀA``, and their length.
        launches: in the order of the stream.
    """

    width: int
    splits: int
    chunk: int
    launches: tuple[Launch, ...]


def ceil_div(number: int, by: int) -> int:
    """The number of blocks of ``by`` that cover ``number``."""
    return -(-number // by)


def split(d: int, tiles: int, block_d: int, programs: int) -> tuple[int, int]:
    """Into how many chunks of neurons a product of so many tiles is cut, and their length, for enough programs.

    A chunk has four blocks of neurons at least, so that writing its part of the result is the lesser work.
    """
    wanted = max(1, min(ceil_div(programs, tiles), d // (4 * block_d)))
    chunk = ceil_div(ceil_div(d, wanted), block_d) * block_d
    return ceil_div(d, chunk), chunk


def plan_pass(
    d: int,
    n: int,
    k: int,
    *,
    a_bytes: int,
    y_bytes: int,
    kept: int,
    gather: bool,
    products: str | None,
    residual: bool,
    product: DenseConfig,
    sweep: SweepConfig,
    programs: int,
    tile_bytes: int,
    busy_programs: int,
) -> Plan:
    """The launches for ``A [d, n]`` with elements of ``a_bytes`` and k features of ``kept`` entries each.

    Args:
        y_bytes: of an element of Y and Z.
        gather: whether products gather the kept rows of A; else they are dense.
        products, residual: as of ``coefficient_pass``.
        product, sweep: the tiles of its kernels.
        programs: that keep the device busy.
        tile_bytes: what a tile of A may have to stay in cache.
        busy_programs: of a sweep for which a tile must have tokens, whether it stays in cache or not.
    """
    # Whole blocks of tokens, so that rows of a tile begin where they can be read 16 bytes at a time.
    unit = max(product.block_n, sweep.block_n)
    width = max(unit, tile_bytes // (d * a_bytes) // unit * unit)
    width = max(width, ceil_div(busy_programs * sweep.block_n, unit) * unit)
    width = min(width, ceil_div(max(n, 1), unit) * unit)
    tiles = ceil_div(k, product.block_k) * ceil_div(width, product.block_n)
    splits, chunk = (1, d) if gather else split(d, tiles, product.block_d, programs)
    launches = []
    for number, start in enumerate(range(0, n, width)):
        tokens = slice(start, min(start + width, n))
        size = tokens.stop - tokens.start
        a = (f"A {number}", d * size * a_bytes)
        y = (f"Y {number}", k * size * y_bytes)
        # One buffer for all tiles, as Z and A Yᵀ are.
        parts = ("ZtA", splits * k * width * y_bytes)
        z = ("Z", k * kept * (y_bytes + 8)) if gather else ("Z", k * d * y_bytes)
        launches.append(Launch("product", tokens, (a, z, parts)))
        launches.append(Launch("sweep", tokens, (parts, ("ZtZ", k * k * y_bytes), y)))
        if residual:
            launches.append(Launch("residual", tokens, (a, y, ("Z dense", k * d * y_bytes))))
        if products == "kept" and gather:
            launches.append(Launch("accumulate_kept", tokens, (a, y, ("AYt", k * kept * y_bytes))))
        elif products is not None:
            launches.append(Launch("accumulate", tokens, (a, y, ("AYt", k * d * y_bytes))))
    return Plan(width, splits, chunk, tuple(launches))


def bytes_from_memory(plan: Plan, cache_bytes: int) -> dict[str, int]:
    """What the launches of a plan read from memory, by name, with a cache that forgets the longest unused first.

    A model: a name is in the cache as a whole or not at all, and what does not fit the cache never is.
    """
    cached: OrderedDict[str, int] = OrderedDict()
    read: dict[str, int] = {}
    for launch in plan.launches:
        for name, size in launch.touches:
            if name in cached:
                cached.move_to_end(name)
                continue
            read[name] = read.get(name, 0) + size
            if size > cache_bytes:
                continue
            cached[name] = size
            while sum(cached.values()) > cache_bytes:
                cached.popitem(last=False)
    return read
