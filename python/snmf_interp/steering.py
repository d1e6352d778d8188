"""Changing a model's neuron activations while it runs: adding, removing or fixing a direction or neurons.

    with steer(model, {23: factors.Z[:, 12]}, strength=8.0):
        texts = generate(model, "I think that")

Whatever the architecture, the change is made to the *input of the MLP's down projection*, at every position of
the prompt and at every decoding step. Adding ``α ẑ`` there adds ``α W_down ẑ`` to what the MLP writes, also
where a norm behind the MLP (Gemma 2 and 3) would drop the length of anything added later.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import hooks

if TYPE_CHECKING:
    import snmf_kernels

    from .models import LanguageModel

Mode = Literal["add", "ablate", "clamp"]
_MODES = ("add", "ablate", "clamp")


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of a layer's activations ``x [d_mlp]``, made at every position.

    With ``vector`` it concerns the direction ẑ = vector / ‖vector‖, with ``neurons`` alone those neurons, and made by
    :meth:`feature` a feature z with its coefficient y on x, as :meth:`snmf_kernels.Factorization.encode` gives it:

    ========== ============================ ============================ =======================================
    mode       a direction ẑ                a feature z                  neurons
    ========== ============================ ============================ =======================================
    "add"      ``x + α ẑ``                  ``x + α ẑ``                  adds α to each of them
    "ablate"   ``x − (x·ẑ) ẑ``              ``x − y z``                  sets them to zero
    "clamp"    ``x + (α − x·ẑ) ẑ``          ``x + (α − y‖z‖) ẑ``         sets them to α
    ========== ============================ ============================ =======================================

    A feature's coefficient is not the projection on its direction: features overlap, and y is what this one explains
    beside all others. ``y‖z‖``, the norm of its contribution, is the strength that tables and pages show.

    Attributes:
        vector: ``[d_mlp]``, a torch tensor or numpy array of any length but zero; or ``[b, d_mlp]``, one for each
            row of the batch.
        mode: see above.
        strength: α, in units of activation, of either sign; or ``[b]``, one for each row of the batch.
            ``"ablate"`` takes none.
        neurons: which neurons. With a ``vector``, its other entries are set to zero before it is scaled to
            unit length, so that α means the same for a feature and for a part of it. Of a feature that is removed or
            clamped, the change of its contribution is made on these neurons alone.
        feature_of: ``(factors, index)`` of a feature that is removed or clamped; :meth:`feature` sets it.

    Raises:
        ValueError: the fields contradict each other, or a number is out of range.
        TypeError: ``vector`` is neither a tensor nor an array.
    """

    vector: Any = None
    mode: Mode = "add"
    strength: Any = None
    neurons: Sequence[int] | Tensor | None = None
    feature_of: tuple[snmf_kernels.Factorization, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode: wanted one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.vector is None and self.neurons is None:
            raise ValueError("Intervention: give a vector, neurons, or both")
        if (self.mode == "ablate") != (self.strength is None):
            wanted = "no strength" if self.mode == "ablate" else "a strength"
            raise ValueError(f"strength: mode {self.mode!r} takes {wanted}, got {self.strength!r}")
        if self.strength is not None:
            strength = torch.as_tensor(self.strength, dtype=torch.float32)
            if strength.ndim > 1 or strength.numel() == 0 or not strength.isfinite().all():
                raise ValueError(
                    f"strength: wanted a finite number, or one for each row of the batch, got {self.strength!r}"
                )
        neurons = None if self.neurons is None else _indices(self.neurons)
        if self.vector is None:
            return
        direction = as_direction(self.vector, rows=True)
        if neurons is not None:
            _check_range(neurons, direction.shape[-1])
            direction = direction[..., neurons.to(direction.device)]
        if not bool((direction.detach().norm(dim=-1) > 0).all()):
            part = "" if neurons is None else f" on the {len(neurons)} neurons"
            raise ValueError(f"vector: it is zero{part}, and so has no direction")

    @classmethod
    def feature(cls, factors: snmf_kernels.Factorization, index: int, **options: Any) -> Intervention:
        """Feature ``index`` of ``factors``, with the other fields by name.

        Raises:
            ValueError: there is no such feature, or it is zero.
        """
        if not 0 <= index < factors.k:
            raise ValueError(f"index: there are features 0-{factors.k - 1}, got {index}")
        feature_of = None if options.get("mode", "add") == "add" else (factors, index)
        return cls(factors.Z[:, index], feature_of=feature_of, **options)


Spec = Intervention | Tensor | np.ndarray


@contextlib.contextmanager
def steer(
    model: LanguageModel,
    interventions: Mapping[int | str, Spec | Sequence[Spec]],
    *,
    strength: float | Sequence[float] | Tensor | None = None,
    kl: float | None = None,
) -> Iterator[None]:
    """Inside the block, the model runs with ``interventions``; afterwards it is as it was, to the bit.

    Args:
        model: the model to steer. Call it as ever: ``model.model(...)``, ``model.model.generate(...)``.
        interventions: for each layer (a number, or a hook name of either naming) what to do, in order. A bare
            tensor or array ``[d_mlp]`` stands for ``Intervention(it, "add", strength)``.
        strength: α of the bare vectors; of no effect on the others.
        kl: instead of ``strength``, for one bare vector: as strong as moves the next-token distribution by this
            divergence in nats (:func:`snmf_interp.solve_strength`, on its prompts). Negate the vector for the
            other sign.

    Blocks may be nested: the inner one acts on what the outer one gives, and each removes its own. Padding is
    steered like everything else, which no other position can see. :func:`snmf_interp.hooks.capture` inside
    the block sees the steered activations.

    A model that ``torch.compile`` has compiled already would go on without the hooks; therefore compiled code
    of this process runs eagerly inside the block, at eager speed.

    Strengths ``[b]`` and vectors ``[b, d_mlp]`` for each row need a batch of exactly that many rows;
    ``num_return_sequences`` and beams of ``generate`` multiply the rows.

    The change is the model's, for all who call it: another thread that runs the same model inside the block is
    steered too, and blocks of several threads add up. Give each thread a model of its own, or run one at a time.

    Raises:
        ValueError: a layer, neuron or width does not belong to the model, or ``strength`` has no bare vector to
            act on, or is missing, or no strength reaches ``kl``. From the model's own call: rows that do not fit
            the batch.
        TypeError: an intervention is neither an :class:`Intervention` nor a vector.
    """
    if kl is not None:
        if strength is not None:
            raise ValueError("kl: wanted a strength or a divergence, got both")
        strength = _strength_for(model, interventions, kl)
    changes = _changes(model, interventions, strength)
    handles = []
    try:
        for layer, ordered in changes.items():
            site = _Site(ordered)
            if any(change.by_row for change in ordered):
                handles.append(
                    model.block(layer).register_forward_pre_hook(site.count_rows, with_kwargs=True)
                )
            handles.append(model.down_projection(layer).register_forward_pre_hook(site))
        with hooks.without_compiled_code():
            yield
    finally:
        for handle in handles:
            handle.remove()


def as_direction(vector: Any, *, rows: bool = False) -> Tensor:
    """``vector`` as a float32 tensor ``[d_mlp]``, or with ``rows`` also ``[b, d_mlp]``.

    Raises:
        ValueError: it is not a finite vector.
        TypeError: it is neither a tensor nor an array.
    """
    if not isinstance(vector, Tensor | np.ndarray):
        raise TypeError(f"vector: wanted a torch tensor or numpy array [d_mlp], got {type(vector).__name__}")
    direction = torch.as_tensor(vector).float()
    fits = direction.numel() > 0 and direction.ndim in ((1, 2) if rows else (1,))
    if not fits or not direction.isfinite().all():
        what = "values that are not finite" if fits else f"shape {list(direction.shape)}"
        wanted = "[d_mlp] or [b, d_mlp]" if rows else "[d_mlp]"
        raise ValueError(f"vector: wanted finite values of shape {wanted}, got {what}")
    return direction


class _Change:
    """An intervention made ready for a layer: tensors in float32 where the layer's weight is."""

    def __init__(self, intervention: Intervention, layer: int, width: int, device: torch.device) -> None:
        neurons = None if intervention.neurons is None else _indices(intervention.neurons)
        mask = torch.ones(width, dtype=torch.bool)
        if neurons is not None:
            _check_range(neurons, width, f" of layer {layer}")
            mask = torch.zeros(width, dtype=torch.bool).index_fill(0, neurons, True)
        self.mask = mask.to(device)
        self.unit: Tensor | None = None
        if intervention.vector is not None:
            direction = as_direction(intervention.vector, rows=True)
            if direction.shape[-1] != width:
                raise ValueError(
                    f"vector: wanted {width} entries, one for each neuron of layer {layer}, "
                    f"got {direction.shape[-1]}"
                )
            kept = direction.to(device) * self.mask
            self.unit = kept / kept.norm(dim=-1, keepdim=True)
        self.adds = intervention.mode == "add"
        self.feature_of = intervention.feature_of
        if self.feature_of is not None:
            # By the feature's own length, and not that of the part on some neurons.
            self.contribution = direction.to(device) * self.mask
            self.norm = float(direction.norm())
            self.unit = None
        given = 0.0 if intervention.mode == "ablate" else intervention.strength
        self.strength = torch.as_tensor(given, dtype=torch.float32).to(device)

    @property
    def by_row(self) -> bool:
        """Whether the rows of a batch are changed differently."""
        return self.strength.ndim > 0 or (self.unit is not None and self.unit.ndim > 1)

    def __call__(self, x: Tensor, strength: Tensor, unit: Tensor | None) -> Tensor:
        """``x [..., d_mlp]`` changed, as a new tensor of its dtype.

        ``strength`` and ``unit`` are those of this change, with x's number of axes where they differ by row.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        strength = strength.to(x.device, precise)
        unit = None if unit is None else unit.to(x.device, precise)
        mask = self.mask.to(x.device)
        if self.feature_of is not None:
            factors, index = self.feature_of
            wide = x.detach().to(precise)
            Y = torch.as_tensor(factors.encode(wide.reshape(-1, wide.shape[-1]).T).Y)[index]
            y = Y.reshape(*wide.shape[:-1], 1).to(x.device, precise)
            return x + ((strength / self.norm - y) * self.contribution.to(x.device, precise)).to(x.dtype)
        if self.adds:
            return x + (strength * (mask if unit is None else unit)).to(x.dtype)
        if unit is None:
            return torch.where(mask, strength.to(x.dtype), x)
        wide = x.to(precise)
        along = (wide * unit).sum(-1, keepdim=True) if unit.ndim > 1 else (wide @ unit)[..., None]
        return (wide + (strength - along) * unit).to(x.dtype)


class _Site:
    """The pre-hook of one down projection."""

    def __init__(self, changes: Sequence[_Change]) -> None:
        self.changes = changes
        self.rows = 0

    def count_rows(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the block: OPT flattens ``[b, t, d]`` before the projection, and there b is lost."""
        self.rows = len(args[0] if args else kwargs["hidden_states"])

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        for change in self.changes:
            strength = change.strength
            if strength.ndim:
                strength = self._spread(strength[:, None], x, "strength")
            unit = change.unit
            if unit is not None and unit.ndim > 1:
                unit = self._spread(unit, x, "vector")
            x = change(x, strength, unit)
        return (x, *inputs[1:])

    def _spread(self, values: Tensor, x: Tensor, name: str) -> Tensor:
        """``values [b, m]``, one row for each row of the batch, along x's first axis and with its number of axes."""
        if len(values) != self.rows:
            raise ValueError(
                f"{name}: got {len(values)} {name}s for a batch of {self.rows} rows; wanted one a row, "
                f"or a single {'number' if name == 'strength' else 'one'}"
            )
        # x is [b, t, d], or [b * t, d].
        per_row = math.prod(x.shape[:-1]) // max(self.rows, 1) if x.ndim == 2 else 1
        spread = values.repeat_interleave(per_row, 0)
        return spread.reshape(len(spread), *[1] * (x.ndim - 2), values.shape[1])


def _changes(
    model: LanguageModel, interventions: Mapping[int | str, Spec | Sequence[Spec]], strength: Any
) -> dict[int, list[_Change]]:
    changes: dict[int, list[_Change]] = {}
    bare = 0
    for name, given in interventions.items():
        layers = model.parse_layers(name)
        if len(layers) != 1:
            raise ValueError(f"interventions: wanted one layer for each key, got {name!r}")
        layer = layers[0]
        for spec in [given] if isinstance(given, Spec) else given:
            if isinstance(spec, Tensor | np.ndarray):
                if strength is None:
                    raise ValueError(f"strength: the bare vector for layer {layer} needs one")
                spec = Intervention(spec, "add", strength)
                bare += 1
            if not isinstance(spec, Intervention):
                raise TypeError(
                    f"interventions: wanted an Intervention or a vector for layer {layer}, "
                    f"got {type(spec).__name__}"
                )
            device = model.down_weight(layer).device
            if device.type == "meta":  # Offloaded: the weight is elsewhere until the layer runs.
                device = torch.device("cpu")
            changes.setdefault(layer, []).append(_Change(spec, layer, model.d_mlp(layer), device))
    if strength is not None and not bare:
        raise ValueError(
            "strength: there is no bare vector that it could act on; set each Intervention's own"
        )
    return changes


def _strength_for(
    model: LanguageModel, interventions: Mapping[int | str, Spec | Sequence[Spec]], kl: float
) -> float:
    """The strength at which the only vector of ``interventions`` has this divergence."""
    from .strengths import solve_strength

    vectors = [
        (name, spec)
        for name, given in interventions.items()
        for spec in ([given] if isinstance(given, Spec) else given)
        if isinstance(spec, Tensor | np.ndarray)
    ]
    if len(vectors) != 1:
        raise ValueError(
            f"kl: wanted one bare vector to solve for, got {len(vectors)}; solve each by solve_strength"
        )
    name, vector = vectors[0]
    layers = model.parse_layers(name)
    found = solve_strength(model, layers[0], vector, kl)
    if not found.reached:
        raise ValueError(
            f"kl: no strength of this vector reaches {kl} nats at layer {layers[0]}: at most {found.kl:.3g}, at "
            f"strength {found.strength:.4g}; take a smaller kl, or give a strength"
        )
    return found.strength


def _indices(neurons: Any) -> Tensor:
    """Distinct neuron numbers, ascending, int64."""
    found = torch.as_tensor(neurons)
    if found.ndim != 1 or found.numel() == 0 or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(
            "neurons: wanted a list of at least one whole number, "
            f"got shape {list(found.shape)} of {found.dtype}"
        )
    return found.to("cpu", torch.int64).unique()


def _check_range(neurons: Tensor, width: int, where: str = "") -> None:
    for neuron in (int(neurons[0]), int(neurons[-1])):
        if not 0 <= neuron < width:
            raise ValueError(f"neurons: the neurons{where} are 0-{width - 1}, got {neuron}")
