"""Progress bars of other libraries, which run through our own lines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from tqdm.std import tqdm


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No bar of tqdm begins inside the block, unless its maker says ``disable=False``.

    Tqdm has a variable for that, TQDM_DISABLE, but reads it once, when it is imported.
    """
    begin = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(begin, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = begin
