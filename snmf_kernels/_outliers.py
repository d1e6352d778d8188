"""Loud tokens and neurons that say next to nothing: what they may weigh in a fit.

A few tokens of a language model (attention sinks above all) are many times as large as the others. Squared residuals
would be ruled by them. Neurons that are all but silent, or that fire on a handful of tokens, would count as much as any
other once each is divided by its root mean square.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ._checks import FitWarning, caller_level
from ._data import DataMatrix, precise_dtype, relative

# A typical norm is the root mean square over this share of the tokens, those of smallest norm, zeros left out.
_TYPICAL_SHARE = 0.9
# A token's norm counts up to so many typical ones; beyond FAR_OUT of them, the less the larger it is. What that is
# worth is in benchmarks/outliers; it costs no detection (benchmarks/defaults), where a limit of 2 may cost some.
CLIP = 3.0
# Scale and weights depend on each other: at most so many rounds, until no weight's root changes by more than this or
# the clipped tokens hold less than this share of the energy.
_ROUNDS, _SETTLED, _NEGLIGIBLE = 10, 0.05, 0.01
# A neuron's scale is at least this share of the median scale.
_LEAST_SCALE = 0.05
# A neuron that fires on fewer tokens than this, and than this share of them, counts the less for it.
_FEW_TOKENS, _FEW_SHARE = 10, 0.01
# Tokens are loud if this share of them holds more than that share of the energy.
_LOUD_SHARE, _LOUD_ENERGY = 0.01, 0.3
# About the limit of what ``snmf_interp.collect`` takes for a sink. In ``clipped_error`` a token beyond it counts as one
# of typical norm.
FAR_OUT = 5.0


class OutlierWarning(FitWarning):
    """A small share of the tokens holds much of the energy of A."""


def scale_and_clip(data: DataMatrix, *, scale: bool, clip: bool) -> Tensor | None:
    """Divides neurons by their root mean square and clips the weights of loud tokens, as is asked for.

    Returns:
        Weights of the tokens ``[n]`` for an error that a few far-out ones do not rule, or None if there are none.
    """
    for _ in range(_ROUNDS):
        if scale:
            data.divide_neurons(_scale(data))
        of_tokens, raw = data.token_squares()
        far_out = _clipped(raw, FAR_OUT, 1.0)
        if not clip:
            break
        weights = _clipped(of_tokens, CLIP, CLIP) * _clipped(of_tokens, FAR_OUT, FAR_OUT)
        # Few loud neurons of a token hide in its scaled norm, since their scale is loud as well.
        weights = torch.minimum(weights, far_out)
        before = torch.ones_like(weights) if data.token_weights is None else data.token_weights
        if float((weights.sqrt() - before.sqrt()).abs().max()) <= _SETTLED:
            break
        data.clip_tokens(weights)
        taken = 1 - _energy(of_tokens, weights) / _energy(of_tokens, before)
        if not scale or (taken < _NEGLIGIBLE and bool((far_out == 1).all())):
            break
    _warn(of_tokens, raw, clip)
    return far_out.to(data.dtype) if bool((far_out < 1).any()) else None


def _scale(data: DataMatrix) -> Tensor:
    """The root mean square of each neuron ``[d]``, but more for those that are all but silent or fire on few tokens."""
    squares, magnitudes = data.row_statistics()
    rms = (squares / data.total_weight).sqrt()
    loud = rms > 0
    if not bool(loud.any()):
        return torch.ones(data.d, dtype=data.dtype, device=data.device)
    # So many tokens of one magnitude would have these sums; of a neuron that is never quite silent they are hundreds.
    tokens = magnitudes.square() / torch.where(loud, squares, 1)
    few = min(_FEW_TOKENS, _FEW_SHARE * data.total_weight)
    rms *= (few / torch.where(loud, tokens, few)).clamp(min=1)
    return rms.clamp(min=_LEAST_SCALE * float(rms[loud].median())).to(data.dtype)


def _clipped(squares: Tensor, limit: float, counts_as: float) -> Tensor:
    """Weights ``[n]`` by which a token of a norm over ``limit`` typical ones counts as one of ``counts_as`` of them."""
    positive = squares[squares > 0]
    if not len(positive):
        return torch.ones_like(squares)
    most = max(1, int(_TYPICAL_SHARE * len(positive)))
    typical = positive[positive <= positive.kthvalue(most).values].mean()
    return torch.where(squares > limit**2 * typical, counts_as**2 * typical / squares, 1)


def _energy(squares: Tensor, weights: Tensor) -> float:
    return float((squares.to(precise_dtype(squares.device)) * weights).sum())


def _warn(of_tokens: Tensor, raw: Tensor, clip: bool) -> None:
    """Says so if a small share of the tokens holds much of the energy, scaled or as it is."""
    loud, precise = int(_LOUD_SHARE * len(raw)), precise_dtype(raw.device)
    if not loud:
        return
    scaled, plain = (
        relative(float(squares.topk(loud).values.sum(dtype=precise)), float(squares.sum(dtype=precise)))
        for squares in (of_tokens, raw)
    )
    if max(scaled, plain) <= _LOUD_ENERGY:
        return
    remedy = (
        "their weights are clipped for the fit"
        if clip
        else "they decide the fit: leave them out, or use token_weights='clip'"
    )
    warnings.warn(
        f"A: {_LOUD_SHARE:.0%} of the tokens hold {max(scaled, plain):.0%} of the energy (attention sinks?); {remedy}. "
        "relative_error is mostly theirs; clipped_error counts them like others",
        OutlierWarning,
        stacklevel=caller_level(),
    )
