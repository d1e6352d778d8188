"""Running the steps of an iteration: at once on a CPU; on a GPU without waiting, and as CUDA graphs where shapes allow.

A GPU is given work faster than it does it only if a step asks for nothing that the GPU has computed, and small steps
only if the dozens of launches of an iteration are recorded once and replayed. Both need steps that find what they read
where it was before: the :class:`State`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sparse import SparseColumns

# How many iterations the host may be ahead of a GPU whose losses it reads to decide what comes next. So many wait in
# the queue then, so that the GPU never idles; the number is fixed, so that no decision depends on timing.
_LAG = 2
# A kind of step is recorded when it has run so many times: the first runs compile kernels and allocate the state.
_BEFORE_RECORDING = 2


def lag_on(device: torch.device) -> int:
    """How many iterations may be under way on a device before the loss of the oldest is read."""
    return _LAG if _runs_ahead(device) else 0


def _runs_ahead(device: torch.device) -> bool:
    return device.type == "cuda"


class State:
    """What one iteration hands to the next.

    Attributes:
        Y: coefficients ``[k, n]``.
        YYt: ``Y Yᵀ [k, k]``.
        AYt: what of ``(A Yᵀ)ᵀ`` the last pass gave, or None.
        Z: the free features, before the first step None.
        loss: of the last iteration, a tensor without dimensions.
    """

    Y: Tensor
    YYt: Tensor
    AYt: Tensor | None
    Z: SparseColumns | None
    loss: Tensor

    def __init__(self, in_place: bool, Y: Tensor, YYt: Tensor) -> None:
        self._in_place = in_place
        self.Y, self.YYt, self.AYt, self.Z = Y, YYt, None, None

    def features(self) -> SparseColumns:
        """Z, which a step before must have set."""
        assert self.Z is not None
        return self.Z

    def update(self, *, Z: SparseColumns | None = None, **tensors: Tensor | None) -> None:
        """Replaces what is named; where steps may be recorded, in place."""
        for name, value in tensors.items():
            self._set(name, value)
        if Z is None:
            return
        if self.Z is None or not self._in_place:
            self.Z = Z
        else:
            self.Z.indices.copy_(Z.indices)
            self.Z.values.copy_(Z.values)

    def tensors(self) -> dict[str, Tensor]:
        """What ``restore`` needs, after the first step."""
        Z = self.features()
        tensors = {"Y": self.Y, "YYt": self.YYt, "loss": self.loss, "indices": Z.indices, "values": Z.values}
        return tensors if self.AYt is None else tensors | {"AYt": self.AYt}

    def restore(self, tensors: dict[str, Tensor], d: int) -> None:
        """Goes on from ``tensors``."""
        self.update(
            Z=SparseColumns(tensors["indices"], tensors["values"], d),
            AYt=tensors.get("AYt"),
            **{name: tensors[name] for name in ("Y", "YYt", "loss")},
        )

    def _set(self, name: str, value: Tensor | None) -> None:
        there = getattr(self, name, None)
        if there is value:
            return
        if there is None or value is None or not self._in_place:
            setattr(self, name, value)
        else:
            there.copy_(value)


class Steps:
    """How steps run on a device.

    Args:
        device: where.
        recordable: whether every operation of a step can be part of a CUDA graph.
        deferred: whether steps must not wait for the device, and keep their state in place; by default on CUDA and
            ROCm devices.
    """

    def __init__(self, device: torch.device, *, recordable: bool, deferred: bool | None = None) -> None:
        self.deferred = _runs_ahead(device) if deferred is None else deferred
        self._device = device
        self._recordable = recordable and _runs_ahead(device)
        self._runs: dict[str, int] = {}
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None

    def state(self, *, Y: Tensor, YYt: Tensor) -> State:
        """The state of a fit that starts from Y."""
        return State(self.deferred, Y, YYt)

    def run(self, kind: str, step: Callable[[], None]) -> None:
        """One step; steps of one kind do the same to the same state."""
        if kind in self._graphs:
            self._graphs[kind].replay()
            return
        runs = self._runs[kind] = self._runs.get(kind, 0) + 1
        if self._recordable and runs > _BEFORE_RECORDING:
            self._graphs[kind] = self._recorded(step)
            self._graphs[kind].replay()
        else:
            step()

    def _recorded(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which waits for the device and collects garbage first: longer than many fits take.
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        # One for all kinds, whose graphs never run side by side, so that they can share memory.
        side = self._side = self._side or torch.cuda.Stream(self._device)
        side.wait_stream(current)
        _forget_workspaces()
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
                _forget_workspaces()
        current.wait_stream(side)
        self._pool = graph.pool()
        return graph


def _forget_workspaces() -> None:
    """Lets cuBLAS take a new workspace for each stream.

    torch keeps one for each, and there are 32 streams in all: a graph with the workspace of a stream that another fit
    has later would write into what that fit is reading. Between two calls of this, a graph's is in its own memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
