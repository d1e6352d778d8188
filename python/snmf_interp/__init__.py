"""Take the MLPs of a language model apart into groups of neurons that people can read.

    from snmf_interp import collect, describe, load_model, read_texts

    model = load_model("smollm2-135m")
    store = collect(model, read_texts("concepts"), layers="12")
    factors = snmf_kernels.fit(store.layer(12).T, k=100)
    features = describe(factors, store, model, layer=12)

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import collect
    from .evaluation import (
        Detection,
        best_neurons,
        evaluate_features,
        permuted_labels,
        random_directions,
        split_texts,
    )
    from .features import Feature, describe
    from .models import LanguageModel, load_model
    from .store import ActivationStore
    from .texts import Sample, read_texts

__all__ = [
    "ActivationStore",
    "Detection",
    "Feature",
    "LanguageModel",
    "Sample",
    "best_neurons",
    "collect",
    "describe",
    "evaluate_features",
    "load_model",
    "permuted_labels",
    "random_directions",
    "read_texts",
    "split_texts",
]

_HOMES = {
    "ActivationStore": "store",
    "Detection": "evaluation",
    "Feature": "features",
    "LanguageModel": "models",
    "Sample": "texts",
    "best_neurons": "evaluation",
    "collect": "activations",
    "describe": "features",
    "evaluate_features": "evaluation",
    "load_model": "models",
    "permuted_labels": "evaluation",
    "random_directions": "evaluation",
    "read_texts": "texts",
    "split_texts": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
