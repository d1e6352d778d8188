"""Triton kernels and their launchers: the names and signatures of ``reference``.

``coefficients`` holds the sweeps over Y, ``selection`` what chooses the entries of Z, ``products`` the products with
A, ``tile_pass`` the pass over A that does all of it a tile at a time, ``schedule`` the plan of its launches,
``configs`` the tiles of every kernel. With ``TRITON_INTERPRET=1`` in the environment before the first import they run
on CPU tensors, for tests.

No launcher waits for the device: what it allocates and launches depends on shapes alone, so that sequences of launches
can be captured as CUDA graphs.
"""

from .coefficients import coordinate_descent, multiplicative_update
from .launch import copy_if
from .products import sparse_product
from .selection import column_descent, winner_take_all
from .tile_pass import coefficient_pass
from .tile_pass import refusal as pass_refusal

__all__ = [
    "coefficient_pass",
    "column_descent",
    "coordinate_descent",
    "copy_if",
    "multiplicative_update",
    "pass_refusal",
    "sparse_product",
    "winner_take_all",
]
