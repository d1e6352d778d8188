"""A compiled solver for sparse semi-nonnegative matrix factorisation: ``A ≈ Z Y``, Y >= 0, Z sparse by column.

``fit`` is the entry point; ``python -m snmf_kernels`` shows what runs on this machine.
"""

from . import ops, reference
from ._backends import BackendError, warn_without_extension
from ._checks import FitWarning
from ._monitor import IterationState
from ._outliers import OutlierWarning
from ._version import __version__
from .factorization import Certificate, Encoding, Factorization, StopReason
from .many import FitManyError, FitManyInterrupted, fit_many
from .solver import fit
from .sparse import SparseColumns

warn_without_extension()

__all__ = [
    "BackendError",
    "Certificate",
    "Encoding",
    "Factorization",
    "FitManyError",
    "FitManyInterrupted",
    "FitWarning",
    "IterationState",
    "OutlierWarning",
    "SparseColumns",
    "StopReason",
    "__version__",
    "fit",
    "fit_many",
    "ops",
    "reference",
]
