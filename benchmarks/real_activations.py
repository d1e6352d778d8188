"""Activations of both bundled models on the bundled corpus, collected once into a folder that git ignores.

As a script it writes one layer as ``data/real_layer.safetensors``, for benchmarks/gpu_report.py on a machine without
the models: 59 MB, bfloat16, tokens × neurons.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from snmf_interp import ActivationStore, collect, load_model, read_texts
from snmf_interp.files import write_tensors

LAYERS = {"smollm2-135m": (0, 10, 29), "gemma-3-270m": (0, 8, 17)}
CASES = [(model, layer) for model, layers in LAYERS.items() for layer in layers]
FOLDER = Path(os.environ.get("SNMF_BENCHMARK_DATA", Path(__file__).parent / "data"))


@cache
def store(model: str) -> ActivationStore:
    """The activations of a model at its layers in ``LAYERS``: text tokens, sinks left out."""
    layers = ",".join(map(str, LAYERS[model]))
    return collect(load_model(model), read_texts("concepts"), layers, out=FOLDER / model)


@cache
def activations(model: str, layer: int) -> Tensor:
    """``A [d, n]`` in float32, token-major storage."""
    return store(model).layer(layer).float().T


if __name__ == "__main__":
    layer = store("gemma-3-270m").layer(8).to(torch.bfloat16).contiguous()
    write_tensors(FOLDER / "real_layer.safetensors", {"A": layer})
