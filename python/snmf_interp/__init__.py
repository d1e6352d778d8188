"""Take the MLPs of a language model apart into groups of neurons that people can read.

    from snmf_interp import collect, describe, load_model, read_texts

    model = load_model("smollm2-135m")
    store = collect(model, read_texts("concepts"), layers="12")
    factors = snmf_kernels.fit(store.layer(12).T, k=100, neuron_scale="rms")
    features = describe(factors, store, model, layer=12)

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import collect
    from .features import Feature, describe
    from .models import LanguageModel, load_model
    from .store import ActivationStore
    from .texts import Sample, read_texts

__all__ = [
    "ActivationStore",
    "Feature",
    "LanguageModel",
    "Sample",
    "collect",
    "describe",
    "load_model",
    "read_texts",
]

_HOMES = {
    "ActivationStore": "store",
    "Feature": "features",
    "LanguageModel": "models",
    "Sample": "texts",
    "collect": "activations",
    "describe": "features",
    "load_model": "models",
    "read_texts": "texts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
