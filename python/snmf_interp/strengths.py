"""How strongly to steer: the strength at which the next-token distribution has moved by a given KL divergence.

Directions found by different methods, and in different layers, have no common unit of strength; they are
compared at the same effect on the model's predictions instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import hooks
from .steering import Intervention, as_direction, steer

if TYPE_CHECKING:
    from .models import LanguageModel

# The paper's seven targets, in nats.
KL_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
# Openings after which nearly anything may follow, the paper's first. After an opening that calls for certain
# words every change lowers those, whatever the direction.
PROMPTS = (
    "I think that",
    "The next thing was",
    "Once again, there is",
    "What I remember is",
    "In the end, they found",
    "Here is a note about",
    "My friend told me about",
    "It all began with",
)
# The ladder of strengths starts at this share of the layer's typical activation norm, and ends at this many.
FIRST, LAST = 1 / 16, 1024.0
# Rungs that are measured together.
_RUNGS = 5
# A bracket that is as narrow as this, relative to its end, is at the limit of single precision.
_NARROWEST = 1e-6


@dataclass(frozen=True)
class Strength:
    """What a search found for one target and sign.

    Attributes:
        target: the wanted divergence in nats.
        sign: +1 or −1.
        strength: α, of that sign: the smallest one measured whose divergence is at least ``target``. Where
            ``reached`` is False, the one of largest divergence.
        kl: the divergence measured there. Where ``reached``, it exceeds ``target`` by no more than the
            tolerance, unless the model's own precision (float16, bfloat16) has no value in between.
        reached: whether ``kl`` is at least ``target``.
    """

    target: float
    sign: int
    strength: float
    kl: float
    reached: bool


def solve_strength(
    model: LanguageModel,
    layer: int,
    direction: Any,
    kl: float,
    prompts: Sequence[str] = PROMPTS,
    *,
    sign: int = 1,
    **options: Any,
) -> Strength:
    """The strength for one target and sign; see :func:`solve_strengths`, as for ``options``."""
    return solve_strengths(model, layer, direction, (kl,), prompts, signs=(sign,), **options)[0]


def solve_strengths(
    model: LanguageModel,
    layer: int,
    direction: Any,
    targets: Sequence[float] = KL_TARGETS,
    prompts: Sequence[str] = PROMPTS,
    *,
    signs: Sequence[int] = (1, -1),
    neurons: Sequence[int] | None = None,
    positions: Literal["last", "all"] = "last",
    tolerance: float = 0.02,
    max_strength: float | None = None,
    batch_size: int = 64,
) -> list[Strength]:
    """Find the strengths α at which adding ``α ẑ`` moves the model's predictions by given divergences.

    The divergence is KL(unsteered ‖ steered) of the next-token distribution in nats, averaged over
    ``prompts``. Each sign is searched apart: along a ladder of doubling strengths until the largest target is
    passed or ``max_strength`` is, then between the first rung that passes a target and the one before, by
    false position on the root of the divergence (which is linear in α near zero), joined by bisection when two
    steps of it were not enough. Divergence need not grow with α; what is found is the first crossing that the
    ladder shows. Many strengths share a forward pass, one to a row.

    Args:
        model: the model; an enclosing :func:`steer` counts as part of it.
        layer: the layer that is steered.
        direction: ``[d_mlp]``, any vector: of a feature, an SAE, a difference of means, chance.
        targets: wanted divergences, above 0.
        prompts: texts; each is encoded behind the start token.
        signs: any of +1 and −1.
        neurons: see :class:`Intervention`.
        positions: ``"last"``, or ``"all"``: the mean over all positions of a prompt but the start token's.
        tolerance: how far above a target is near enough, as a share of it.
        max_strength: where the ladder ends; by default 1,024 times the typical norm of the layer's
            activations on the prompts. Where a norm behind the MLP drops its length (Gemma 2 and 3), the
            divergence has long stopped growing there.
        batch_size: rows in a forward pass.

    Returns:
        For each sign, in the order given, one :class:`Strength` for each target, in the order given.

    Raises:
        ValueError: an argument is out of range, a prompt has no token, or the model's unsteered predictions
            are not finite.
        TypeError: ``direction`` is neither a tensor nor an array.
    """
    if not targets or not all(target > 0 and math.isfinite(target) for target in targets):
        raise ValueError(f"targets: wanted divergences above 0, got {list(targets)}")
    if not signs or not set(signs) <= {1, -1}:
        raise ValueError(f"signs: wanted any of 1 and -1, got {list(signs)}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: wanted a share between 0 and 1, got {tolerance}")
    if max_strength is not None and not 0 < max_strength < math.inf:
        raise ValueError(f"max_strength: wanted more than 0, got {max_strength}")
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    direction = as_direction(direction)
    meter = Meter(model, layer, prompts, positions, batch_size)
    limit = LAST * meter.typical_norm if max_strength is None else max_strength
    first = min(FIRST * meter.typical_norm, limit)
    searches = {sign: Search(targets, first, limit, tolerance) for sign in signs}
    while wanted := [(sign, alpha) for sign, search in searches.items() for alpha in search.proposals()]:
        measured = meter.divergences(direction, neurons, [sign * alpha for sign, alpha in wanted])
        for (sign, alpha), value in zip(wanted, measured, strict=True):
            searches[sign].record(alpha, value)
    return [searches[sign].result(target, sign) for sign in signs for target in targets]


def encode_prompts(model: LanguageModel, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and which are a prompt's own (not padding, not the start token), ``[b, t]`` each.

    Padded on the left.

    Raises:
        ValueError: no prompt, or one without a token.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: wanted a list of at least one text, got {prompts!r}")
    encoded = [model.encode(prompt) for prompt in prompts]
    n_start = 0 if model.start_token_id is None else 1
    if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) == n_start]:
        raise ValueError(f"prompts: {empty[0]!r} has no token")
    ids, mask = hooks.pad(encoded, side="left", pad_id=model.pad_id)
    # The start token comes first behind the padding.
    return ids, mask, mask.cumsum(1) > n_start


def next_token(model: LanguageModel, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities of the next token, ``[prompts, vocabulary]`` float32 on the CPU; steering is seen."""
    ids, mask, _ = encode_prompts(model, prompts)
    logits: Tensor = hooks.forward(model, ids, mask, last_only=True).logits[:, -1]
    return logits.float().log_softmax(-1).cpu()


class Meter:
    """Divergence from the unsteered model on fixed prompts; arguments as for :func:`solve_strengths`."""

    def __init__(
        self, model: LanguageModel, layer: int, prompts: Sequence[str], positions: str, batch_size: int
    ) -> None:
        if positions not in ("last", "all"):
            raise ValueError(f"positions: wanted 'last' or 'all', got {positions!r}")
        self.model, self.layer, self.batch_size = model, layer, batch_size
        self.last = positions == "last"
        self.ids, self.mask, self.counted = encode_prompts(model, prompts)
        self.references: list[Tensor] = []
        norms = []
        for rows in torch.arange(len(prompts)).split(batch_size):
            with hooks.capture(model, [layer]) as captured:
                self.references += self._log_probabilities(rows)
            norms.append(
                captured[layer].float().norm(dim=-1).reshape(len(rows), -1).cpu()[self.counted[rows]]
            )
        if any(reference.isnan().any() for reference in self.references):
            raise ValueError(f"model: the predictions of {model.name!r} are not finite without any steering")
        # Over the counted positions; a layer that is silent there has no scale of its own.
        self.typical_norm = float(torch.cat(norms).median()) or 1.0

    def divergences(self, direction: Any, neurons: Any, strengths: Sequence[float]) -> list[float]:
        """The mean divergence over prompts at each strength; not finite where the model's output is not."""
        if not strengths:
            return []
        n_prompts = len(self.ids)
        prompt_of = torch.arange(n_prompts).repeat(len(strengths))
        strength_of = torch.tensor(strengths, dtype=torch.float32).repeat_interleave(n_prompts)
        values: list[Tensor] = []
        for rows, alphas in zip(
            prompt_of.split(self.batch_size), strength_of.split(self.batch_size), strict=True
        ):
            with steer(self.model, {self.layer: Intervention(direction, "add", alphas, neurons)}):
                steered = self._log_probabilities(rows)
            values += map(_divergence, [self.references[row] for row in rows.tolist()], steered)
        means: list[float] = torch.stack(values).reshape(-1, n_prompts).mean(1).tolist()
        return means

    def _log_probabilities(self, rows: Tensor) -> list[Tensor]:
        """Of the next token, ``[counted positions, vocabulary]`` for each of these prompts."""
        logits = hooks.forward(self.model, self.ids[rows], self.mask[rows], last_only=self.last).logits
        counted = [slice(-1, None)] * len(rows) if self.last else self.counted[rows].to(logits.device)
        return [row[where].float().log_softmax(-1) for row, where in zip(logits, counted, strict=True)]


def _divergence(reference: Tensor, steered: Tensor) -> Tensor:
    """KL(reference ‖ steered), from log-probabilities ``[m, vocabulary]``, averaged over m, on the CPU."""
    p = reference.exp()
    # A token that a model rules out has no share in the divergence, rather than −inf + inf.
    terms = torch.where(p > 0, p * (reference - steered), torch.zeros_like(p))
    return terms.sum(-1).clamp_min(0).mean().double().cpu()


class Search:
    """The search along one sign: proposes strengths, is told divergences, and knows when it is done."""

    def __init__(self, targets: Sequence[float], first: float, limit: float, tolerance: float) -> None:
        self.targets, self.limit, self.tolerance = targets, limit, tolerance
        self.measured = {0.0: 0.0}
        self.rung: float | None = first
        self.steps = dict.fromkeys(targets, 0)

    def proposals(self) -> list[float]:
        """Strengths to measure next; none when no target would gain by it."""
        wanted: list[float] = []
        if max(self.measured.values()) < max(self.targets):
            for _ in range(_RUNGS):
                if self.rung is None:
                    break
                wanted.append(self.rung)
                self.rung = min(2 * self.rung, self.limit) if self.rung < self.limit else None
        for target in self.targets:
            wanted += self._within(target)
        return sorted(set(wanted) - self.measured.keys())

    def record(self, strength: float, divergence: float) -> None:
        """Take in a measurement; one that is not finite ends the range of strengths that can be used."""
        if math.isfinite(divergence):
            self.measured[strength] = divergence
        else:
            self.measured = {alpha: kl for alpha, kl in self.measured.items() if alpha < strength}
            self.rung = None

    def result(self, target: float, sign: int) -> Strength:
        """The smallest strength that reached ``target``, or the one that came nearest."""
        reaching = [alpha for alpha, kl in self.measured.items() if kl >= target]
        alpha = min(reaching) if reaching else max(self.measured, key=lambda a: (self.measured[a], -a))
        return Strength(target, sign, sign * alpha, self.measured[alpha], bool(reaching))

    def _within(self, target: float) -> list[float]:
        """Strengths inside the first bracket of ``target``; none when it is found or not yet bracketed."""
        low, low_kl = 0.0, 0.0
        for high, high_kl in sorted(self.measured.items()):
            if high_kl >= target:
                break
            low, low_kl = high, high_kl
        else:
            return []
        if high_kl <= (1 + self.tolerance) * target or high - low <= _NARROWEST * high:
            return []
        # Aimed at the middle of the tolerance, so that a small error stays within it.
        a, b, aim = (math.sqrt(kl) for kl in (low_kl, high_kl, (1 + self.tolerance / 2) * target))
        self.steps[target] += 1
        straight = low + (high - low) * (aim - a) / (b - a)
        # Two steps do nearly always; should they not, halving makes sure of an end.
        return [straight] if self.steps[target] <= 2 else [straight, (low + high) / 2]
