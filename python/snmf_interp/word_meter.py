"""Word logits and divergence under many directions at once: what group_effects and immediate measure by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import hooks
from .steering import Intervention, steer
from .strengths import FIRST, LAST, Search, encode_prompts, next_token

if TYPE_CHECKING:
    from .models import LanguageModel

# A random set's divergence is near enough within this share of the wanted one; the rest is interpolated.
_NEAR = 0.1
# Passes over the random sets, the first at the strength of the set that they are the control of. After the second
# nearly all are near; the others are for the rest.
_PASSES = 4
# How much a pass may change a strength.
_STEP = 8.0


class Measured(NamedTuple):
    """What directions do to the next token, averaged over a meter's prompts.

    Attributes:
        kl: divergence from the unsteered model, ``[r]`` float64 nats.
        shifts: the change of what the meter watches, ``[r, width]`` float64: of each word its logit less the mean of
            its controls', or of each token its logit less the mean over the vocabulary.
        log_probability: of each word the change of its log-probability, ``[r, words]`` float64 nats; ``[r, 0]`` of a
            meter that watches no words.
    """

    kl: Tensor
    shifts: Tensor
    log_probability: Tensor


class NextTokenMeter:
    """Divergence from the unsteered model, and changes of logits, at the token behind fixed prompts.

    What is watched is up to the subclass: :meth:`_watched` and :meth:`_log_probabilities`.

    Args:
        model, layer: what is steered.
        prompts: texts, each behind the start token.
        batch_size: rows in a forward pass.
        parts: in how many parts the prompts are averaged over, one after the other in turn; there is a shift for each.

    Attributes:
        typical_norm: the median norm of the layer's activations on the prompts.
        width: entries of a shift: what is watched, for each part.

    Raises:
        ValueError: fewer prompts than parts, or a prompt without a token.
    """

    def __init__(
        self, model: LanguageModel, layer: int, prompts: Sequence[str], batch_size: int, parts: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
        if len(prompts) < parts:
            raise ValueError(f"prompts: wanted at least {parts}, got {len(prompts)}")
        self.parts = parts
        self.model, self.layer, self.batch_size = model, layer, batch_size
        self.ids, self.mask, own = encode_prompts(model, prompts)
        with hooks.capture(model, [layer]) as captured:
            logits = self._logits(torch.arange(len(self.ids)), None, None)
        norms = captured[layer].float().norm(dim=-1).reshape(len(self.ids), -1).cpu()
        self.typical_norm = float(norms[own].median()) or 1.0
        self.references = logits.log_softmax(-1)
        self.probabilities = self.references.exp()
        self.negative_entropy = torch.special.xlogy(self.probabilities, self.probabilities).sum(-1)
        self.before = self._watched(logits)
        self.width = self.parts * self.before.shape[1]
        self._part_of = torch.arange(len(self.ids)) % self.parts

    def _watched(self, logits: Tensor) -> Tensor:
        """What is made of logits ``[b, vocabulary]``, ``[b, watched]``: its change is the shift."""
        raise NotImplementedError

    def _rise(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """The change of the log-probabilities that are measured beside it, ``[b, words]``; by default of none."""
        return logits[:, :0]

    def measure(self, directions: Tensor, strengths: Tensor) -> Measured:
        """What the model does under each direction at its strength, averaged over the prompts.

        Args:
            directions: ``[r, d_mlp]``.
            strengths: ``[r]``.
        """
        count, n_prompts = len(directions), len(self.ids)
        # Prompt by prompt, shortest first: a batch holds prompts of about one length, and little padding.
        order = self.mask.sum(1).argsort(stable=True)
        prompt_of, row_of = order.repeat_interleave(count), torch.arange(count).repeat(n_prompts)
        kl = torch.zeros(count, dtype=torch.float64)
        shifts = torch.zeros(count * self.parts, self.before.shape[1], dtype=torch.float64)
        sizes = self._part_of.bincount(minlength=self.parts)
        log_probability = torch.zeros(
            count, self._rise(self.references, torch.arange(n_prompts)).shape[1]
        ).double()
        for prompts, rows in zip(
            prompt_of.split(self.batch_size), row_of.split(self.batch_size), strict=True
        ):
            logits = self._logits(prompts, directions[rows], strengths[rows])
            kl.index_add_(0, rows, self._divergence(logits, prompts) / n_prompts)
            change = self._watched(logits) - self.before[prompts]
            part = self._part_of[prompts]
            shifts.index_add_(0, rows * self.parts + part, change.double() / sizes[part][:, None])
            log_probability.index_add_(0, rows, self._rise(logits, prompts).double() / n_prompts)
        return Measured(kl, shifts.reshape(count, self.width), log_probability)

    def _logits(self, prompts: Tensor, directions: Tensor | None, strengths: Tensor | None) -> Tensor:
        """Of the next token ``[b, vocabulary]``, float32 on the CPU."""
        first = int(self.mask[prompts].any(0).nonzero()[0])
        ids, mask = self.ids[prompts, first:], self.mask[prompts, first:]
        if directions is None:
            logits = hooks.forward(self.model, ids, mask, last_only=True).logits
        else:
            with steer(self.model, {self.layer: Intervention(directions, "add", strengths)}):
                logits = hooks.forward(self.model, ids, mask, last_only=True).logits
        # A token that the model rules out must not make the divergence inf − inf.
        found: Tensor = logits[:, -1].float().cpu().clamp_min(-1e30)
        return found

    def _divergence(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """KL(unsteered ‖ steered) ``[b]``: ``Σ p log p − Σ p · logits + logsumexp(logits)``."""
        expected = torch.empty(len(logits))
        for prompt in prompts.unique().tolist():
            rows = prompts == prompt
            expected[rows] = logits[rows] @ self.probabilities[prompt]
        values = self.negative_entropy[prompts] - expected + logits.logsumexp(-1)
        return values.double().clamp_min(0)


class WordMeter(NextTokenMeter):
    """Watches words: shifts are changes of their logits less the mean change of their controls'.

    Args:
        model, layer, prompts, batch_size: see :class:`NextTokenMeter`.
        words: the words to watch, each a single token behind a space.
        controls: of each word the words that its logit is compared with.

    Attributes:
        log_probability: of each word behind the prompts without steering, averaged, ``[words]``.

    Raises:
        ValueError: no prompt, a prompt without a token, a word that is not a single token, or one without controls.
    """

    def __init__(
        self,
        model: LanguageModel,
        layer: int,
        prompts: Sequence[str],
        words: Sequence[str],
        controls: Mapping[str, Sequence[str]],
        batch_size: int = 64,
    ) -> None:
        if lacking := [word for word in words if not controls.get(word)]:
            raise ValueError(f"controls: wanted at least one word for each word, got none for {lacking[0]!r}")
        self.words = torch.tensor([word_token(model, word) for word in words])
        self.controls = [torch.tensor([word_token(model, other) for other in controls[w]]) for w in words]
        super().__init__(model, layer, prompts, batch_size)
        self.log_probability = self.references[:, self.words].mean(0)

    def _watched(self, logits: Tensor) -> Tensor:
        """The logit of each word less the mean of its controls', ``[b, words]``."""
        means = torch.stack([logits[:, ids].mean(1) for ids in self.controls], 1)
        return logits[:, self.words] - means

    def _rise(self, logits: Tensor, prompts: Tensor) -> Tensor:
        rise = logits[:, self.words] - logits.logsumexp(-1, keepdim=True)
        return rise - self.references[prompts][:, self.words]


class VocabularyMeter(NextTokenMeter):
    """Watches every token: shifts are changes of logits less the mean change over the vocabulary.

    A constant added to all logits changes no prediction.
    """

    def _watched(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(-1, keepdim=True)


def word_token(model: LanguageModel, word: str) -> int:
    """The id of a word behind a space.

    Raises:
        ValueError: it is not a single token.
    """
    ids = model.encode(f" {word}")[0 if model.start_token_id is None else 1 :]
    if len(ids) != 1 or ids[0] == model.tokenizer.unk_token_id:
        raise ValueError(
            f"words: {word!r} is not a single token of {model.name} ({len(ids)} tokens behind a space); leave it out"
        )
    return int(ids[0])


def is_single_token(model: LanguageModel, word: str) -> bool:
    """Whether a word is a single token behind a space."""
    try:
        word_token(model, word)
    except ValueError:
        return False
    return True


def single_tokens(model: LanguageModel, words: Sequence[str]) -> tuple[str, ...]:
    """The words that are one token behind a space, as they are given or with a capital.

    A first token alone would often be another word: " to" of "Tokyo".
    """
    spellings = dict.fromkeys(form for word in words for form in (word, word.capitalize()))
    return tuple(form for form in spellings if is_single_token(model, form))


def matched_words(
    model: LanguageModel, words: Sequence[str], prompts: Sequence[str], count: int = 10
) -> dict[str, list[str]]:
    """Words that the model finds as likely as each of ``words`` after neutral prompts.

    Likely means the log-probability of the next token, averaged over ``prompts``, without steering: the model's own
    unigram statistic. A control is a single token, at least three ASCII letters behind a space, and neither begins
    one of ``words`` nor is begun by one ("Mon", "Mondays").

    Returns:
        For each word the ``count`` nearest, nearest first.

    Raises:
        ValueError: no prompt, a word that is not a single token, or fewer than ``count`` controls.
    """
    if count < 1:
        raise ValueError(f"count: wanted at least 1 control word, got {count}")
    likely = next_token(model, prompts).mean(0)
    targets = {word: word_token(model, word) for word in words}
    avoid = [word.lower() for word in words]
    usable: dict[int, str | None] = {}

    def control(token: int) -> str | None:
        """The word that a token is, or None; most tokens are never asked for."""
        if token not in usable:
            text = model.token_text(token) if token not in model.special_ids else ""
            word = text.strip()
            fits = len(word) >= 3 and word.isascii() and word.isalpha()
            fits = fits and not any(w.startswith(word.lower()) or word.lower().startswith(w) for w in avoid)
            usable[token] = word if fits and _is_token(model, word, token) else None
        return usable[token]

    found: dict[str, list[str]] = {}
    for word, token in targets.items():
        nearest = (likely - likely[token]).abs().argsort(stable=True).tolist()
        names = (name for other in nearest if (name := control(other)) is not None)
        found[word] = [name for name, _ in zip(names, range(count), strict=False)]
        if len(found[word]) < count:
            raise ValueError(
                f"count: wanted {count} control words for {word!r}, but the vocabulary has only {len(found[word])}"
            )
    return found


class Solved(NamedTuple):
    """A direction at the strength that reaches a divergence.

    Attributes:
        strength: α, above 0.
        kl: the divergence achieved, in nats.
        reached: whether it is the wanted one; else the largest that was found.
        shifts, log_probability: see :class:`Measured`; ``[words]``.
    """

    strength: float
    kl: float
    reached: bool
    shifts: Tensor
    log_probability: Tensor


def solve_each(
    meter: NextTokenMeter, directions: Sequence[Tensor], targets: Sequence[float], tolerance: float = 0.02
) -> list[list[Solved]]:
    """Of each direction the positive strength that reaches each divergence, many directions in a forward pass.

    The search is that of :func:`snmf_interp.solve_strengths`.

    Args:
        meter: measures divergence and words, on its prompts.
        directions: ``[d_mlp]`` each, of any length but zero.
        targets: divergences in nats.
        tolerance: how far above a target is near enough, as a share of it.

    Returns:
        For each direction one :class:`Solved` for each target, in the order given.
    """
    limit = LAST * meter.typical_norm
    first = min(FIRST * meter.typical_norm, limit)
    searches = [Search(targets, first, limit, tolerance) for _ in directions]
    silent = torch.zeros(meter.width, dtype=torch.float64)
    seen = [{0.0: (silent, silent)} for _ in directions]
    while wanted := [(i, alpha) for i, search in enumerate(searches) for alpha in search.proposals()]:
        rows = torch.stack([directions[i] for i, _ in wanted])
        measured = meter.measure(rows, torch.tensor([alpha for _, alpha in wanted]))
        for at, (i, alpha) in enumerate(wanted):
            searches[i].record(alpha, float(measured.kl[at]))
            seen[i][alpha] = measured.shifts[at], measured.log_probability[at]
    return [
        [
            Solved(one.strength, one.kl, one.reached, *own[one.strength])
            for one in (search.result(target, 1) for target in targets)
        ]
        for search, own in zip(searches, seen, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Steered:
    """Many directions at about one divergence.

    Attributes:
        strength: of the nearest measurement, ``[r]``.
        kl: the divergence of the nearest measurement, ``[r]`` float64.
        reached: whether the wanted divergence was passed, or missed by less than a tenth, ``[r]``.
        shifts: the meter's shifts, interpolated to the wanted divergence, ``[r, watched]``; where it was not reached,
            those at the nearest measurement.
        typical_error: the median of ``|kl / wanted − 1|`` among those reached; None if none was.
    """

    strength: Tensor
    kl: Tensor
    reached: Tensor
    shifts: Tensor
    typical_error: float | None

    @property
    def share_reached(self) -> float:
        """The share of directions that reached the divergence."""
        return float(self.reached.double().mean())


def steer_to(meter: NextTokenMeter, directions: Tensor, kl: float, start: float) -> Steered:
    """Many directions at about the same divergence, in few forward passes.

    All begin at ``start``; then each goes by false position on the root of its divergence, which is linear in the
    strength near zero. Shifts are interpolated linearly in that root between the two measurements about the wanted one.
    """
    count, goal = len(directions), math.sqrt(kl)
    alphas = torch.full((count,), start)
    roots = [torch.zeros(count, dtype=torch.float64)]
    strengths = [torch.zeros(count)]
    shifts = [torch.zeros(count, meter.width, dtype=torch.float64)]
    open_rows = torch.arange(count)
    for _ in range(_PASSES):
        divergence, change, _ = meter.measure(directions[open_rows], alphas[open_rows])
        divergence = torch.where(divergence.isfinite(), divergence, 0)
        root, strength, shift = roots[-1].clone(), strengths[-1].clone(), shifts[-1].clone()
        root[open_rows], strength[open_rows], shift[open_rows] = divergence.sqrt(), alphas[open_rows], change
        roots.append(root)
        strengths.append(strength)
        shifts.append(shift)
        off = (root.square() / kl - 1).abs() > _NEAR
        open_rows = off.nonzero().squeeze(1)
        if not len(open_rows):
            break
        alphas = _next(torch.stack(strengths), torch.stack(roots), goal)
    return _interpolated(torch.stack(strengths), torch.stack(roots), torch.stack(shifts), goal)


def _next(strengths: Tensor, roots: Tensor, goal: float) -> Tensor:
    """The next strengths, from those measured ``[passes, r]`` and the roots there, the unsteered model first.

    False position between the measurements about the goal; where all are below it, along the secant of the last two,
    or the line through zero if that falls.
    """
    rows = torch.arange(roots.shape[1])
    low_root, low_at = torch.where(roots <= goal, roots, -math.inf).max(0)
    high_root, high_at = torch.where(roots >= goal, roots, math.inf).min(0)
    low, high = strengths[low_at, rows], strengths[high_at, rows]
    bracketed = high_root.isfinite() & (high != low)
    inside = low + (high - low) * ((goal - low_root) / (high_root - low_root).where(bracketed, 1.0)).float()
    last, before = strengths[-1], strengths[-2]
    slope = (roots[-1] - roots[-2]) / (last - before).double().where(last != before, 1.0)
    through_zero = roots[-1] / last
    slope = torch.where(slope > 0.1 * through_zero, slope, through_zero).clamp_min(1e-12)
    beyond = (last + (goal - roots[-1]) / slope).float()
    return torch.where(bracketed, inside, beyond.clamp(last / _STEP, last * _STEP))


def _interpolated(strengths: Tensor, roots: Tensor, shifts: Tensor, goal: float) -> Steered:
    """From measurements ``[passes, r]`` and ``[passes, r, watched]``, the unsteered one first, to root ``goal``."""
    below = torch.where(roots <= goal, roots, -math.inf)
    above = torch.where(roots >= goal, roots, math.inf)
    low, low_at = below.max(0)
    high, high_at = above.min(0)
    rows = torch.arange(roots.shape[1])
    nearest, nearest_at = (roots.square() / goal**2 - 1).abs().min(0)
    bracketed = high.isfinite()
    span = torch.where(bracketed, high - low, 1.0)
    share = torch.where(span > 0, (goal - low) / span.clamp_min(1e-12), 0.0)[:, None]
    between = shifts[low_at, rows] + share * (shifts[high_at, rows] - shifts[low_at, rows])
    # Within reach, but only from below: the line through zero and the nearest.
    last = shifts[nearest_at, rows]
    scaled = last * (goal / roots[nearest_at, rows].clamp_min(1e-12))[:, None]
    reached = bracketed | (nearest <= _NEAR)
    found = torch.where(bracketed[:, None], between, torch.where(reached[:, None], scaled, last))
    error = float(nearest[reached].median()) if bool(reached.any()) else None
    return Steered(strengths[nearest_at, rows], roots[nearest_at, rows].square(), reached, found, error)


def _is_token(model: LanguageModel, word: str, token: int) -> bool:
    return model.encode(f" {word}")[0 if model.start_token_id is None else 1 :] == [token]
