"""Hierarchies of features: factorise the features of a factorisation again, level upon level, and tune all together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import snmf_kernels
from snmf_kernels import Factorization, IterationState, SparseColumns, StopReason, ops

from . import files
from .joint import JointIteration, JointOptions, Levels, Products, Tokens, finetune, joint_loss
from .levels import Hierarchy, Level

logger = logging.getLogger(__name__)

_FORMAT, _VERSION = "snmf_interp.hierarchy.checkpoint", 1
# Of `snmf_kernels.fit`, what makes sense on every level.
_FIT_OPTIONS = ("solver", "refit", "sweeps", "init", "ridge", "max_iter", "tol", "patience", "backend")


@dataclass(frozen=True)
class HierarchyState:
    """What the callback of :func:`fit_hierarchy` is told.

    Attributes:
        stage: ``"level 0"``, ``"level 1"``, … while levels are factorised, then ``"joint"``.
        n_iter, max_iter: iterations of this stage done, and the bound on them.
        relative_error: of what this stage minimises.
    """

    stage: str
    n_iter: int
    max_iter: int
    relative_error: float


def fit_hierarchy(
    A: Tensor | np.ndarray,
    sizes: Sequence[int],
    *,
    keep: float | Sequence[float] = 0.01,
    neuron_scale: str | None = "rms",
    feature_norm: str = "unit",
    link_penalty: float = 0.2,
    joint: JointOptions | None = JointOptions(),  # noqa: B008  # frozen
    base: Factorization | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[HierarchyState], Any] | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Hierarchy:
    """Factorises activations, then their features, and so on, and fine-tunes all levels together.

    Level 0 is ``A ≈ Z_0 Y_0`` by :func:`snmf_kernels.fit`. Each next level is a fit of the features of the level
    below, ``Z_l ≈ Z_{l+1} Y_{l+1}``, with winner-take-all on each Z (Shafran, Geiger & Geva, ACL 2026). Fine-tuning
    then lowers the joint loss over all factors, with every Y non-negative and every Z within its sparsity at all
    times; see :func:`snmf_interp.joint.finetune` for its steps.

    Three defaults differ from the paper, whose hierarchy is ``feature_norm="energy", link_penalty=0,
    joint=JointOptions("top")``. On the bundled models' activations (levels of 400, 200, 100 and 50 features), the mean
    over 206 labelled concepts of the best feature's average precision, by level:

    ==================================  =======================  =======================
    setting                             SmolLM2, layer 10        Gemma 3, layer 8
    ==================================  =======================  =======================
    no hierarchy: four fits of A        .237 .193 .145 .117      .269 .243 .172 .119
    the default                         .236 .193 .138 .099      .264 .207 .156 .103
    … without fine-tuning               .237 .193 .149 .114      .269 .206 .165 .113
    … fine-tuned for ``"top"``          .170 .142 .127 .104      .172 .137 .118 .098
    … and ``link_penalty=0``            .236 .118 .058 .038      .273 .180 .078 .032
    the paper's                         .203 .109 .074 .045      .257 .174 .116 .073
    ==================================  =======================  =======================

    The penalty keeps features from hanging on every parent a little, which makes a level's effective coefficients
    all alike. The loss of the top level alone does not need the levels below to stand for anything: any non-negative
    C_L is a product of such factors. Their own losses rise (at layer 10 from 0.63 to 0.90 at level 0), while
    fine-tuning for all levels lowers those of the upper ones (from 1.15, 1.11, 1.04 to 0.81, 0.91, 0.95) and keeps
    the first.

    Args:
        A: activations ``[d, n]`` as for :func:`snmf_kernels.fit`: any strides and floating dtype.
        sizes: features of each level, falling, such as ``[400, 200, 100, 50]``.
        keep: fraction of neurons that a feature keeps; one number, or one for each level.
        neuron_scale: ``"rms"`` divides each neuron by its root mean square on the tokens before anything is fitted:
            this one scale on every level, and in the joint loss. Z and ``relative_error`` are in the units of A all the
            same. None: as they are; features then share more neurons, the loud ones (see :func:`snmf_interp.overlap`).
            With ``base``, its scale is used.
        feature_norm: how features weigh in the fit of the level above them. ``"unit"``: all alike, columns of Z at
            unit norm. ``"energy"``: by what they do to the tokens, rows of Y at unit norm.
        link_penalty: ``l1`` of the fits from level 1 on (see :func:`snmf_kernels.fit`): a feature hangs on a parent
            only as far as its projection on it exceeds this share of a typical feature's norm. 0 for dense links.
        joint: options of fine-tuning; None for the recursion alone.
        base: a factorisation of A with the same ``keep``, to be level 0 instead of a fit.
        seed: of the fits.
        device: where to compute. Default: where A is.
        dtype: torch.float32 or torch.float64 for Y_0 and the fits. Default: float64 for float64 A, else float32. All
            that is not of size n is float64.
        callback: called with a :class:`HierarchyState` after each iteration; returning True stops that stage.
        checkpoint: a folder. Each finished level, and fine-tuning after each iteration, is written there; the same
            call goes on from there, to the same result. The folder may be deleted when the call has returned.
        options: of :func:`snmf_kernels.fit`, for the fits of all levels: ``solver``, ``refit``, ``sweeps``, ``init``
            (by name), ``ridge``, ``max_iter``, ``tol``, ``patience``, ``backend``.

    Returns:
        A :class:`Hierarchy` of torch tensors, on the device of the computation.

    Raises:
        TypeError, ValueError: an argument is not as described, or the checkpoint is of another call.
    """
    wanted_sizes = _falling(sizes)
    keeps = _keeps(keep, len(wanted_sizes))
    if unknown := sorted(set(options) - set(_FIT_OPTIONS)):
        raise TypeError(
            f"{unknown[0]}: no option of fit_hierarchy; of fit it takes {', '.join(_FIT_OPTIONS)}"
        )
    if feature_norm not in ("unit", "energy"):
        raise ValueError(f"feature_norm: wanted 'unit' or 'energy', got {feature_norm!r}")
    if not link_penalty >= 0:
        raise ValueError(f"link_penalty: wanted a number >= 0, got {link_penalty}")
    if link_penalty and options.get("solver") == "mu":
        raise ValueError(
            "link_penalty: solver='mu' is the paper's iteration, which has none; give link_penalty=0"
        )
    matrix = _matrix(A)
    matrix = matrix.to(matrix.device if device is None else device)
    d, n = matrix.shape
    working = dtype or (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    counts = [_count(share, d) for share in keeps]
    if base is not None:
        _check_base(base, d, n, wanted_sizes[0], counts[0])
    energies = Tokens(matrix, None, working).energies
    if not bool(energies.isfinite().all()):
        raise ValueError("A: wanted finite values, got NaN, infinite or too large ones")
    record = {
        "sizes": wanted_sizes,
        "keep": keeps,
        "neuron_scale": neuron_scale if base is None else base.options.get("neuron_scale"),
        "feature_norm": feature_norm,
        "link_penalty": float(link_penalty),
        "joint": dataclasses.asdict(joint) if joint else None,
        "base": None if base is None else _digest(base),
        "seed": seed,
        "dtype": str(working).removeprefix("torch."),
        "backend": "auto",
        **options,
    }
    store = _Checkpoint(checkpoint, record, energies)

    start, scale = _recursion(matrix, record, options, base, store, callback, working)
    tokens = Tokens(matrix, scale, working)
    products = tokens.products(start.Y[0])
    start_losses = [_relative_loss(start, products, level, tokens) for level in range(len(counts))]
    if joint is None:
        return _result(start, products, tokens, keeps, start_losses, (), 0, None, record)

    def note(state: JointIteration) -> Any:
        store.write_joint(state)
        if callback is None:
            return None
        n_iter = len(state.losses) - 1
        return callback(HierarchyState("joint", n_iter, joint.max_iter, state.losses[-1] / joint_norm))

    joint_norm = tokens.squared_norm * len(joint.counted(len(counts)))
    state, products, stop_reason = finetune(
        tokens, store.read_joint(matrix.device) or start, counts, joint, note
    )
    logger.debug("fine-tuning stopped after %d iterations: %s", len(state.losses) - 1, stop_reason)
    losses = tuple(loss / joint_norm if joint_norm else 0.0 for loss in state.losses)
    return _result(
        state.levels, products, tokens, keeps, start_losses, losses, state.rejected, stop_reason, record
    )


def _recursion(
    matrix: Tensor,
    record: Mapping[str, Any],
    options: Mapping[str, Any],
    base: Factorization | None,
    store: _Checkpoint,
    callback: Callable[[HierarchyState], Any] | None,
    dtype: torch.dtype,
) -> tuple[Levels, Tensor | None]:
    """The fits of all levels, in the units of the fit of level 0, and the scale of those units."""
    sizes, keeps = record["sizes"], record["keep"]

    def fit_level(level: int, data: Tensor, **own: Any) -> Factorization:
        there = store.read_level(level)
        if there is not None:
            return there
        note = None if callback is None else functools.partial(_note_level, callback, level)
        common = {"keep": keeps[level], "seed": record["seed"], "dtype": dtype, "callback": note, **options}
        # All tokens alike, as in the fine-tuning.
        common["token_weights"] = None
        made = snmf_kernels.fit(data, sizes[level], **common, **own)
        store.write_level(level, made)
        return made

    bottom = base or fit_level(0, matrix, neuron_scale=record["neuron_scale"])
    Z, Y = (torch.as_tensor(factor).to(matrix.device, dtype) for factor in (bottom.Z, bottom.Y))
    scale = None if bottom.neuron_scale is None else torch.as_tensor(bottom.neuron_scale).to(Z)
    features, coefficients = [Z if scale is None else Z / scale[:, None]], [Y]
    for level in range(1, len(sizes)):
        Z, Y = features[-1], coefficients[-1]
        weights = 1 / _nonzero(Z.norm(dim=0)) if record["feature_norm"] == "unit" else Y.norm(dim=1)
        factors = fit_level(level, Z * weights, neuron_scale=None, l1=record["link_penalty"])
        features.append(torch.as_tensor(factors.Z).to(Z))
        coefficients.append(torch.as_tensor(factors.Y).to(Z) / _nonzero(weights))
    sparse = (
        ops.winner_take_all(Z.double(), _count(keep, Z.shape[0]))
        for Z, keep in zip(features, keeps, strict=True)
    )
    return Levels(tuple(sparse), (coefficients[0], *(Y.double() for Y in coefficients[1:]))), scale


def _check_base(base: Factorization, d: int, n: int, k: int, count: int) -> None:
    if (tuple(base.Z.shape), tuple(base.Y.shape)) != ((d, k), (k, n)):
        raise ValueError(
            f"base: wanted a factorisation of A with {k} features, Z {[d, k]} and Y {[k, n]}, got "
            f"{list(base.Z.shape)} and {list(base.Y.shape)}"
        )
    fullest = int((torch.as_tensor(base.Z) != 0).sum(0).max())
    if fullest > count:
        raise ValueError(
            f"base: wanted at most {count} neurons in a feature, as keep has it, got {fullest}; "
            "give the keep that it was fitted with"
        )


def _digest(base: Factorization) -> str:
    """What tells one factorisation from another, for a checkpoint."""
    digest = hashlib.sha256()
    for factor in (base.Z, base.Y):
        digest.update(torch.as_tensor(factor).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _note_level(callback: Callable[[HierarchyState], Any], level: int, state: IterationState) -> Any:
    return callback(HierarchyState(f"level {level}", state.n_iter, state.max_iter, state.relative_error))


def _result(
    levels: Levels,
    products: Products,
    tokens: Tokens,
    keeps: Sequence[float],
    start_losses: Sequence[float],
    losses: tuple[float, ...],
    rejected: int,
    stop_reason: StopReason | None,
    record: Mapping[str, Any],
) -> Hierarchy:
    scale = tokens.scale
    made = []
    for number, (Z, Y) in enumerate(zip(levels.Z, levels.Y, strict=True)):
        in_units = Z if scale is None else Z.scaled_rows(scale)
        energy = float(tokens.energies.sum())
        error = joint_loss(levels, products, [number], energy, scale)
        made.append(
            Level(
                Z=in_units.to_dense().to(tokens.dtype),
                Y=Y.to(tokens.dtype),
                keep=keeps[number],
                relative_error=error / energy if energy else 0.0,
                relative_loss=_relative_loss(levels, products, number, tokens),
                start_loss=start_losses[number],
            )
        )
    return Hierarchy(
        levels=tuple(made),
        neuron_scale=None if scale is None else scale.to(tokens.dtype),
        loss_history=losses,
        rejected=rejected,
        stop_reason=stop_reason,
        options=record,
    )


def _relative_loss(levels: Levels, products: Products, level: int, tokens: Tokens) -> float:
    loss = joint_loss(levels, products, [level], tokens.squared_norm)
    return loss / tokens.squared_norm if tokens.squared_norm else 0.0


class _Checkpoint:
    """The folder of a fit that may be cut short; or none."""

    def __init__(self, folder: str | Path | None, record: Mapping[str, Any], energies: Tensor) -> None:
        """Raises ValueError if the folder holds the state of another call."""
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        plan = self.folder / "plan.safetensors"
        if plan.is_file():
            header, tensors = files.read_bundle(plan, _FORMAT, _VERSION)
            there, energies = header["options"], energies.cpu()
            differing = [name for name in {**there, **record} if there.get(name) != record.get(name)]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"checkpoint: {self.folder} was begun with {name} = {there.get(name)}, not {record.get(name)}; "
                    "give the same options, or another folder"
                )
            same = tensors["energies"].shape == energies.shape
            if not same or not torch.allclose(tensors["energies"], energies, rtol=1e-6):
                raise ValueError(
                    f"checkpoint: {self.folder} was begun on other activations; give another folder"
                )
        else:
            header = {"format": _FORMAT, "version": _VERSION, "options": dict(record)}
            files.write_bundle(plan, header, {"energies": energies})

    def read_level(self, level: int) -> Factorization | None:
        path = self._level(level)
        return Factorization.load(path) if path is not None and path.is_file() else None

    def write_level(self, level: int, factors: Factorization) -> None:
        path = self._level(level)
        if path is not None:
            factors.save(path)

    def read_joint(self, device: torch.device) -> JointIteration | None:
        if self.folder is None or not self._joint.is_file():
            return None
        header, tensors = files.read_bundle(self._joint, _FORMAT, _VERSION)
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        n_levels = len([name for name in tensors if name.startswith("Y.")])
        return JointIteration(
            Levels(
                tuple(
                    SparseColumns(on_device[f"indices.{i}"], on_device[f"values.{i}"], header["d"])
                    for i in range(n_levels)
                ),
                tuple(on_device[f"Y.{i}"] for i in range(n_levels)),
            ),
            tuple(tensors["losses"].tolist()),
            header["rejected"],
        )

    def write_joint(self, state: JointIteration) -> None:
        if self.folder is None:
            return
        tensors = {"losses": torch.tensor(state.losses, dtype=torch.float64)}
        for i, (Z, Y) in enumerate(zip(state.levels.Z, state.levels.Y, strict=True)):
            tensors |= {f"indices.{i}": Z.indices, f"values.{i}": Z.values, f"Y.{i}": Y}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "d": state.levels.Z[0].d,
            "rejected": state.rejected,
        }
        files.write_bundle(self._joint, header, tensors)

    @property
    def _joint(self) -> Path:
        assert self.folder is not None
        return self.folder / "joint.safetensors"

    def _level(self, level: int) -> Path | None:
        return None if self.folder is None else self.folder / f"level_{level}.safetensors"


def _count(keep: float, d: int) -> int:
    """``ceil(keep·d)`` of the decimal fraction that was written."""
    return math.ceil(Fraction(repr(keep)) * d)


def _nonzero(norms: Tensor) -> Tensor:
    """1 for what is zero."""
    return torch.where(norms > 0, norms, 1)


def _matrix(A: Any) -> Tensor:
    if isinstance(A, np.ndarray):
        with warnings.catch_warnings():
            # A read-only array or memmap: nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            A = torch.from_numpy(A)
    if not isinstance(A, Tensor):
        raise TypeError(f"A: wanted a torch tensor or numpy array, got {type(A).__name__}")
    if A.ndim != 2 or not A.is_floating_point():
        raise ValueError(f"A: wanted a floating-point matrix [d, n], got {A.dtype} of shape {tuple(A.shape)}")
    return A.detach()


def _falling(sizes: Sequence[int]) -> list[int]:
    found = [operator.index(k) for k in sizes]
    if len(found) < 2 or found[-1] < 1 or any(b >= a for a, b in itertools.pairwise(found)):
        raise ValueError(
            "sizes: wanted two or more numbers of features, each smaller than the one before, such as "
            f"[400, 200, 100]; got {found}"
        )
    return found


def _keeps(keep: float | Sequence[float], n_levels: int) -> list[float]:
    keeps = [float(keep)] * n_levels if isinstance(keep, int | float) else [float(share) for share in keep]
    if len(keeps) != n_levels:
        raise ValueError(f"keep: wanted one number, or one for each of {n_levels} levels, got {len(keeps)}")
    if not all(0 < share <= 1 for share in keeps):
        raise ValueError(f"keep: wanted fractions in (0, 1], got {keeps}")
    return keeps
