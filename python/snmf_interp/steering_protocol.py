"""The paper's steering test for any direction: seven divergences, sampled text, and a score.

    protocol = Protocol()
    plain = unsteered(model, protocol)
    record = steer_concept(model, 12, rival, [(7, 0.93), (41, 0.88)], "weather", [scorer], protocol, plain)
    record.results["words"].gain             # score above that of unsteered text, on prompts not used for choosing

A direction is added as it is: a feature is y ≥ 0 times a column z of Z, and −z is not that feature. The paper takes
the better of both signs, which ``both_signs`` does too; chance then has the same choice. What is chosen (the direction
among a method's best detectors, the divergence, the sign where there is a choice) is chosen on half of the prompts and
reported on the other half. Source: Shafran, Geiger & Geva (arXiv:2506.10920), who report the best strength on the
prompt that it was found on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .generation import Continuation, generate
from .runs import versions
from .steering import Intervention, steer
from .strengths import KL_TARGETS, PROMPTS, Meter, solve_strengths
from .text_scoring import Scorer, TextScore, mean_score

if TYPE_CHECKING:
    from .dictionaries import Dictionary
    from .immediate import ImmediateMeter
    from .models import LanguageModel

# Of what is done below; records of another are made again.
VERSION = "2"


@dataclass(frozen=True)
class Protocol:
    """What is generated and how; the defaults are the paper's where it says.

    Attributes:
        targets: divergences in nats.
        choosing, reporting: prompts on which strengths are found and everything is chosen, and other prompts on
            which the result is reported.
        samples: continuations of each choosing prompt at each divergence (and sign, where both are tried); with four
            prompts two make the paper's eight texts.
        report_samples: continuations of each reporting prompt at what was chosen.
        max_new_tokens, temperature, top_p, seed: see :func:`snmf_interp.generate`.
        candidates: how many of a method's best detectors are tried.
        screen_kl: the divergence at which they are compared by how far they raise the concept's words.
        batch_size: texts generated together.
    """

    targets: tuple[float, ...] = KL_TARGETS
    choosing: tuple[str, ...] = PROMPTS[0::2]
    reporting: tuple[str, ...] = PROMPTS[1::2]
    samples: int = 2
    report_samples: int = 8
    max_new_tokens: int = 50
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    candidates: int = 3
    screen_kl: float = 0.25
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("samples", "report_samples", "max_new_tokens", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        for name in ("choosing", "reporting"):
            if not getattr(self, name):
                raise ValueError(f"{name}: wanted at least one prompt, got none")
        if both := set(self.choosing) & set(self.reporting):
            raise ValueError(
                f"reporting: wanted prompts that are not chosen on, got {sorted(both)[0]!r} in both"
            )

    def texts(self, model: LanguageModel, prompts: Sequence[str], samples: int) -> list[list[Continuation]]:
        """Continuations under whatever steering is in force."""
        return generate(
            model,
            prompts,
            samples=samples,
            streams=self._streams(prompts),
            batch_size=self.batch_size,
            **self._sampling(),
        )

    def _streams(self, prompts: Sequence[str]) -> list[int]:
        """The noise of each prompt; the two halves have none in common."""
        first = len(self.choosing) if tuple(prompts) == self.reporting else 0
        return list(range(first, first + len(prompts)))

    def steered(
        self,
        model: LanguageModel,
        layer: int,
        direction: Tensor,
        strengths: Sequence[float],
        prompts: Sequence[str],
        samples: int,
    ) -> list[list[Continuation]]:
        """Continuations of all prompts for each strength, prompt by prompt; the noise is that of :meth:`texts`."""
        together = max(1, self.batch_size // (len(prompts) * samples))
        found: list[list[Continuation]] = []
        for first in range(0, len(strengths), together):
            part = strengths[first : first + together]
            rows = torch.tensor(part).repeat_interleave(len(prompts) * samples)
            with steer(model, {layer: Intervention(direction, "add", rows)}):
                texts = generate(
                    model,
                    list(prompts) * len(part),
                    samples=samples,
                    streams=self._streams(prompts) * len(part),
                    batch_size=len(rows),
                    **self._sampling(),
                )
            flat = [one for row in texts for one in row]
            size = len(prompts) * samples
            found += [flat[i * size : (i + 1) * size] for i in range(len(part))]
        return found

    def _sampling(self) -> dict[str, Any]:
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Unsteered:
    """What the model writes without steering, on both halves of the prompts, prompt by prompt."""

    choosing: tuple[Continuation, ...]
    reporting: tuple[Continuation, ...]


@dataclass(frozen=True)
class Candidate:
    """A direction that was considered.

    Attributes:
        index: in its dictionary.
        train_auroc: as a detector of the concept on training texts; None where there are none.
        effect: by how far it raises the concept's words above words that were as likely, at ``screen_kl`` on the
            choosing prompts (:attr:`snmf_interp.ImmediateEffect.shift`); where both signs are tried, the larger of
            the two. None where there was nothing to choose.
        sign: +1, or the sign of ``effect`` where both are tried.
    """

    index: int
    train_auroc: float | None
    effect: float | None = None
    sign: int = 1


@dataclass(frozen=True)
class Cell:
    """One divergence and sign on the choosing prompts.

    Attributes:
        target, sign, strength, kl, reached: see :class:`snmf_interp.Strength`.
        scores: by scorer the mean score of its texts, None if none could be scored.
        texts: the continuations without their prompts; empty where the strength is that of an earlier cell.
        missing: by scorer the share of its texts without a score.
        unanswered: by scorer how many of them a second question may give one.
    """

    target: float
    sign: int
    strength: float
    kl: float
    reached: bool
    scores: dict[str, float | None]
    texts: tuple[str, ...] = ()
    missing: dict[str, float] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one scorer says of the cell that it chose, on the reporting prompts.

    Attributes:
        target, sign, strength: of the cell.
        kl: the divergence at its strength on the reporting prompts.
        score, concept, fluency: means over the texts that could be scored, None if none could.
        baseline: the mean score of the unsteered texts, for the same concept.
        permuted: how specific the steering is: the mean over the other concepts of how far the same texts are above
            unsteered ones as texts on *those*; None where it was not asked for. Chance is not this but a random
            group's ``gain``, since the choices are made by the concept's own words.
        missing: the share of texts without a score.
        texts: the continuations without their prompts.
        unanswered: how many of the texts a second question may give a score.
    """

    target: float
    sign: int
    strength: float
    kl: float
    score: float | None
    concept: float | None
    fluency: float | None
    baseline: float | None
    permuted: float | None
    missing: float
    texts: tuple[str, ...]
    unanswered: int = 0

    @property
    def gain(self) -> float | None:
        """The score above that of unsteered text."""
        return None if self.score is None or self.baseline is None else self.score - self.baseline


@dataclass(frozen=True)
class SteeringRecord:
    """One method's attempt to steer to one concept at one layer.

    Attributes:
        layer, method, concept: what was tried.
        candidates: the directions considered, and
        chosen: the index of the one taken.
        sign: with which sign it raises the concept's words; +1 unless both were tried.
        both_signs: whether both were, for a method that has a choice; DiffMeans has one sign.
        cells: each divergence (and sign, where both are tried) on the choosing prompts.
        results: by scorer; a scorer that could score nothing has none.
        made_by: the protocol's version, a digest of the direction, the identity of each scorer, and the versions of
            packages.
    """

    layer: int
    method: str
    concept: str
    candidates: tuple[Candidate, ...]
    chosen: int
    sign: int
    both_signs: bool
    cells: tuple[Cell, ...]
    results: dict[str, Outcome] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)

    def is_by(self, scorers: Sequence[Scorer]) -> bool:
        """Whether these scorers, and this version of the protocol, have made it, and none has yet to answer."""
        return self.made_by.get("protocol") == VERSION and all(
            self.made_by.get(scorer.name) == scorer.identity and self._is_complete(scorer.name)
            for scorer in scorers
        )

    def _is_complete(self, scorer: str) -> bool:
        outcome = self.results.get(scorer)
        waiting = any(cell.unanswered.get(scorer) for cell in self.cells)
        return not waiting and (outcome is None or not outcome.unanswered)


def unsteered(model: LanguageModel, protocol: Protocol) -> Unsteered:
    """The texts that steered ones are compared with; they meet the same noise."""
    halves = [
        tuple(one for row in protocol.texts(model, prompts, samples) for one in row)
        for prompts, samples in (
            (protocol.choosing, protocol.samples),
            (protocol.reporting, protocol.report_samples),
        )
    ]
    return Unsteered(*halves)


def aim(
    model: LanguageModel,
    layer: int,
    dictionary: Dictionary,
    candidates: Sequence[tuple[int, float | None]],
    concept: str,
    protocol: Protocol,
    *,
    meter: ImmediateMeter | None = None,
    both_signs: bool = False,
) -> SteeringRecord:
    """The first two steps of :func:`steer_concept`: a direction and its strengths, without any text.

    Args:
        model, layer, dictionary, candidates, concept, protocol, meter, both_signs: see there.

    Returns:
        A record whose cells have neither texts nor scores, and without results.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError(f"candidates: wanted at least one for {concept!r}, got none")
    # A direction that was made for the concept has the sign that it was made with.
    signs = (1, -1) if both_signs and dictionary.concepts is None else (1,)
    considered = _screen(dictionary, candidates[: protocol.candidates], concept, signs, meter)
    chosen = max(considered, key=lambda one: float("-inf") if one.effect is None else one.effect)
    direction = dictionary.direction(chosen.index)
    solved = solve_strengths(
        model,
        layer,
        direction,
        protocol.targets,
        protocol.choosing,
        signs=signs,
        batch_size=protocol.batch_size,
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return SteeringRecord(
        layer,
        dictionary.name,
        concept,
        tuple(considered),
        chosen.index,
        chosen.sign,
        both_signs,
        tuple(Cell(one.target, one.sign, one.strength, one.kl, one.reached, {}) for one in solved),
        made_by={"protocol": VERSION, "packages": packages, "direction": direction_digest(direction)},
    )


def steer_concept(
    model: LanguageModel,
    layer: int,
    dictionary: Dictionary,
    candidates: Sequence[tuple[int, float | None]],
    concept: str,
    scorers: Sequence[Scorer],
    protocol: Protocol,
    plain: Unsteered,
    *,
    meter: ImmediateMeter | None = None,
    both_signs: bool = False,
    permuted: Sequence[str] = (),
) -> SteeringRecord:
    """Try to make the model write about a concept with a method's directions, at the input of a down projection.

    1. Of ``candidates`` the one that raises the concept's words most at ``screen_kl``, above words that were as
       likely, on the choosing prompts.
    2. Strengths for each divergence (:func:`snmf_interp.solve_strengths`) on the choosing prompts.
    3. Texts at each; for each scorer the cell of highest mean score, the smaller divergence among equals.
    4. Texts on the reporting prompts at what was chosen, scored.

    Args:
        model: the model.
        layer: which layer is steered.
        dictionary: the method.
        candidates: ``(index, AUROC on training texts or None)``, best first.
        concept: its name, as the scorers know it.
        scorers: each chooses for itself.
        protocol: the options.
        plain: :func:`unsteered` of the same model and protocol.
        meter: of this layer, for step 1; without one, or where no word of the concept is a single token, the first
            candidate is taken.
        both_signs: whether −direction is tried beside +direction in all steps, unless the dictionary's directions are
            made for concepts, which gives them a sign.
        permuted: other concepts that every scorer but a judge scores the reported texts for.

    Raises:
        ValueError: there is no candidate or scorer.
    """
    if not scorers:
        raise ValueError("scorers: wanted at least one, got none")
    aimed = aim(model, layer, dictionary, candidates, concept, protocol, meter=meter, both_signs=both_signs)
    direction = dictionary.direction(aimed.chosen)
    # Targets that are not reached share one strength.
    distinct = list(dict.fromkeys(cell.strength for cell in aimed.cells))
    texts = dict(
        zip(
            distinct,
            protocol.steered(model, layer, direction, distinct, protocol.choosing, protocol.samples),
            strict=True,
        )
    )
    scored = {
        strength: {scorer.name: scorer.score(texts[strength], concept) for scorer in scorers}
        for strength in distinct
    }
    cells: list[Cell] = []
    for bare in aimed.cells:
        fresh = all(other.strength != bare.strength for other in cells)
        own = scored[bare.strength]
        cells.append(
            replace(
                bare,
                scores={name: mean_score(scores) for name, scores in own.items()},
                texts=tuple(text.text for text in texts[bare.strength]) if fresh else (),
                missing={name: _missing(scores) for name, scores in own.items()},
                unanswered={name: _unanswered(scores) for name, scores in own.items()},
            )
        )
    best = {scorer.name: cell for scorer in scorers if (cell := _best(cells, scorer.name)) is not None}
    wanted = list(dict.fromkeys(cell.strength for cell in best.values()))
    reported = dict(
        zip(
            wanted,
            protocol.steered(model, layer, direction, wanted, protocol.reporting, protocol.report_samples),
            strict=True,
        )
    )
    reporting = Meter(model, layer, protocol.reporting, "last", protocol.batch_size)
    kl = dict(zip(wanted, reporting.divergences(direction, None, wanted), strict=True))
    results = {
        scorer.name: _outcome(
            scorer,
            best[scorer.name],
            kl[best[scorer.name].strength],
            reported[best[scorer.name].strength],
            plain.reporting,
            concept,
            permuted,
        )
        for scorer in scorers
        if scorer.name in best
    }
    made_by = aimed.made_by | {scorer.name: scorer.identity for scorer in scorers}
    return replace(aimed, cells=tuple(cells), results=results, made_by=made_by)


def _screen(
    dictionary: Dictionary,
    candidates: Sequence[tuple[int, float | None]],
    concept: str,
    signs: Sequence[int],
    meter: ImmediateMeter | None,
) -> list[Candidate]:
    """How far each candidate raises the concept's words on the choosing prompts, at its better sign."""
    if meter is None or not meter.has_words(concept) or len(candidates) * len(signs) == 1:
        return [Candidate(index, area) for index, area in candidates]
    tried = [(index, sign) for index, _ in candidates for sign in signs]
    rises = meter.rises([sign * dictionary.direction(index) for index, sign in tried], concept)
    considered = []
    for index, area in candidates:
        effects = [(rise, sign) for (other, sign), rise in zip(tried, rises, strict=True) if other == index]
        considered.append(Candidate(index, area, *max(effects)))
    return considered


def _best(cells: Sequence[Cell], scorer: str) -> Cell | None:
    """The cell of highest score, the smaller divergence among equals; None if none could be scored."""
    scored = [(score, -cell.target, cell) for cell in cells if (score := cell.scores[scorer]) is not None]
    return max(scored, key=lambda entry: entry[:2])[2] if scored else None


def _outcome(
    scorer: Scorer,
    cell: Cell,
    kl: float,
    texts: Sequence[Continuation],
    plain: Sequence[Continuation],
    concept: str,
    permuted: Sequence[str],
) -> Outcome:
    scores = scorer.score(texts, concept, complete=True)
    others = [name for name in permuted if name != concept] if scorer.name != "judge" else []
    gains = [
        gain
        for name in others
        if (gain := _difference(mean_score(scorer.score(texts, name)), mean_score(scorer.score(plain, name))))
        is not None
    ]
    return Outcome(
        cell.target,
        cell.sign,
        cell.strength,
        kl,
        mean_score(scores),
        _mean([one.concept for one in scores]),
        _mean([one.fluency for one in scores]),
        mean_score(scorer.score(plain, concept)),
        sum(gains) / len(gains) if gains else None,
        _missing(scores),
        tuple(one.text for one in texts),
        _unanswered(scores),
    )


def _difference(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _missing(scores: Sequence[TextScore]) -> float:
    return sum(one.score is None for one in scores) / len(scores)


def _unanswered(scores: Sequence[TextScore]) -> int:
    return sum(one.unanswered for one in scores)


def direction_digest(direction: Tensor) -> str:
    """What tells a direction from that of another fit, for :attr:`SteeringRecord.made_by`."""
    return hashlib.sha256(direction.cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def record_from_json(content: Mapping[str, Any]) -> SteeringRecord:
    """What :func:`dataclasses.asdict` made of a record, after JSON."""
    return SteeringRecord(
        content["layer"],
        content["method"],
        content["concept"],
        tuple(Candidate(**one) for one in content["candidates"]),
        content["chosen"],
        content["sign"],
        content["both_signs"],
        tuple(Cell(**one | {"texts": tuple(one["texts"])}) for one in content["cells"]),
        {name: Outcome(**one | {"texts": tuple(one["texts"])}) for name, one in content["results"].items()},
        dict(content.get("made_by", {})),
    )
