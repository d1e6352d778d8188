"""Compiled kernels. Addresses and strides are not checked: use snmf_kernels.ops."""

from collections.abc import Callable
from typing import TypedDict

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    levels: str
    level: str
    openmp: bool
    cuda: str | None
    cuda_architectures: str

def build_info() -> _BuildInfo: ...
def set_level(name: str) -> None: ...
def multiplicative_update(
    dtype: str,
    Y: int,
    ldy: int,
    ZtA: int,
    ldp: int,
    ZtZ: int,
    out: int,
    ldo: int,
    k: int,
    n: int,
    eps: float,
    sweeps: int,
    threads: int,
) -> None: ...
def coordinate_descent(
    dtype: str,
    Y: int,
    ldy: int,
    ZtA: int,
    ldp: int,
    ZtZ: int,
    out: int,
    ldo: int,
    k: int,
    n: int,
    sweeps: int,
    threads: int,
) -> None: ...
def winner_take_all(
    dtype: str,
    Z: int,
    row_stride: int,
    column_stride: int,
    d: int,
    k: int,
    count: int,
    indices: int,
    values: int,
    threads: int,
) -> None: ...
def sparse_product(
    dtype: str,
    a_dtype: str,
    A: int,
    row_stride: int,
    column_stride: int,
    d: int,
    n: int,
    indices: int,
    values: int,
    k: int,
    count: int,
    starts: int,
    out: int,
    threads: int,
) -> None: ...
def coefficient_pass(
    dtype: str,
    a_dtype: str,
    A: int,
    row_stride: int,
    column_stride: int,
    d: int,
    n: int,
    indices: int,
    values: int,
    k: int,
    count: int,
    starts: int,
    ZtZ: int,
    Y: int,
    ldy: int,
    out: int,
    ldo: int,
    row_scale: int,
    shift: int,
    token_weights: int,
    AYt: int,
    feature_norms: int,
    max_active: int,
    residual_values: int,
    multiplicative: bool,
    sweeps: int,
    eps: float,
    tol: float,
    measure: bool,
    threads: int,
    listener: Callable[[float], object] | None,
) -> tuple[float, float, float, float, float, int]: ...
def column_descent(
    dtype: str,
    YYt: int,
    AYt: int,
    indices: int,
    values: int,
    d: int,
    k: int,
    count: int,
    sweeps: int,
) -> None: ...
def support_solve(
    dtype: str,
    G: int,
    offsets: int,
    members: int,
    B: int,
    X: int,
    info: int,
    k: int,
    d: int,
    ridge: float,
    escalations: int,
    floor: float,
    threads: int,
) -> None: ...
def ridge_solve(
    dtype: str,
    G: int,
    B: int,
    X: int,
    info: int,
    batch: int,
    k: int,
    m: int,
    ridge: float,
    escalations: int,
    floor: float,
    threads: int,
) -> None: ...
def cuda_device_count() -> int: ...

# Only in builds with CUDA code.
def cuda_ridge_max_k(device: int, element_size: int) -> int: ...
def cuda_ridge_solve(
    dtype: str,
    G: int,
    B: int,
    X: int,
    info: int,
    batch: int,
    k: int,
    m: int,
    ridge: float,
    escalations: int,
    floor: float,
    device: int,
    stream: int,
) -> None: ...
def cuda_support_workspace(k: int, d: int, member_count: int, device: int, element_size: int) -> int: ...
def cuda_support_solve(
    dtype: str,
    G: int,
    offsets: int,
    members: int,
    B: int,
    X: int,
    info: int,
    k: int,
    d: int,
    member_count: int,
    ridge: float,
    escalations: int,
    floor: float,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
