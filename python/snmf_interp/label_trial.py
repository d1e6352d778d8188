"""The paper's steering test: each labelled feature is turned up, and a judge reads the text for the feature's label.

    trial = LabelTrial.open(run, model, Protocol())
    for record in trial.steer(6, labels, [JudgeScorer(llm)], sentences=write_sentences(labels, llm)):
        record.method, record.concept, record.results["judge"].gain

Source: Shafran, Geiger & Geva (arXiv:2506.10920). Unlike a concept of the corpus, a label is what a language model made
of the feature itself, so that the score judges label and feature together. What is kept in ``DIR/eval-labels`` is
not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .activations import collect
from .attempts import kept_attempt, kept_unsteered, open_plan
from .dictionaries import Dictionary, ProjectionDictionary, features, random_groups
from .steering_protocol import Protocol, SteeringRecord, Unsteered, direction_digest, steer_concept
from .texts import Sample

if TYPE_CHECKING:
    from .labels import Label
    from .models import LanguageModel
    from .runs import Run
    from .sentences import Sentences
    from .text_scoring import Scorer


@dataclass
class LabelTrial:
    """Labelled features of a run, steered towards their labels; get one from :meth:`open`."""

    run: Run
    model: LanguageModel
    protocol: Protocol
    seed: int
    folder: Path

    @classmethod
    def open(
        cls, run: Run, model: LanguageModel, protocol: Protocol, *, seed: int = 0, overwrite: bool = False
    ) -> LabelTrial:
        """Begin a test, or go on with it.

        Args:
            run: with factorised layers.
            model: the model that it is of.
            protocol: what is written.
            seed: of the random groups.
            overwrite: replace a test with other options.

        Raises:
            ValueError: the model is another, or the folder has a test with other options.
        """
        run.check_model(model)
        folder = run.path / "eval-labels"
        open_plan(folder, {"protocol": asdict(protocol), "seed": seed}, overwrite=overwrite)
        return cls(run, model, protocol, seed, folder)

    @cached_property
    def plain(self) -> Unsteered:
        """The texts that the model writes without steering."""
        return kept_unsteered(self.folder / "unsteered.json", self.model, self.protocol)

    def steer(
        self,
        layer: int,
        labels: Sequence[Label],
        scorers: Sequence[Scorer],
        *,
        sentences: Sequence[Sentences] = (),
        both_signs: bool = False,
    ) -> Iterator[SteeringRecord]:
        """Each feature towards its label, then the rivals: ``diffmeans`` where there are sentences, and ``random``.

        DiffMeans is the difference between sentences that were written to be about the label and neutral ones. A random
        group has as many neurons as the feature.

        Args:
            layer: a factorised layer.
            labels: of its features; those with a text are tried, of equal ones the first.
            scorers: who knows every label: judges.
            sentences: of :func:`snmf_interp.write_sentences`.
            both_signs: whether features and random groups may also be turned round, as in the paper.
        """
        factors = self.run.factors(layer)
        tried: dict[str, Label] = {}
        for label in labels:
            if label.text is not None:
                tried.setdefault(label.text, label)
        written = [one for one in sentences if one.activating and one.layer == layer]
        means = sentence_means(self.model, layer, written) if written else None
        row_of = {one.index: row for row, one in enumerate(written)}
        ours, chance = features(factors), random_groups(factors, seed=self.seed)
        for text, label in tried.items():
            rivals: list[tuple[Dictionary, int]] = [(ours, label.index), (chance, label.index)]
            if means is not None and label.index in row_of:
                rivals.insert(1, (means, row_of[label.index]))
            for rival, row in rivals:
                yield self._attempt(layer, rival, row, label.index, text, scorers, both_signs)

    def _attempt(
        self,
        layer: int,
        rival: Dictionary,
        row: int,
        feature: int,
        label: str,
        scorers: Sequence[Scorer],
        both_signs: bool,
    ) -> SteeringRecord:
        digest = direction_digest(rival.direction(row))
        folder = self.folder / f"layer_{layer}"
        if both_signs and rival.concepts is None:
            folder = folder / "both-signs"

        def make() -> SteeringRecord:
            return steer_concept(
                self.model, layer, rival, [(row, None)], label, scorers, self.protocol, self.plain,
                both_signs=both_signs,
            )  # fmt: skip

        record = kept_attempt(
            folder / rival.name / f"{feature}.json",
            lambda record: (
                record.concept == label
                and record.made_by.get("direction") == digest
                and record.is_by(scorers)
            ),
            make,
        )
        return replace(record, both_signs=both_signs)


def sentence_means(model: LanguageModel, layer: int, sentences: Sequence[Sentences]) -> ProjectionDictionary:
    """DiffMeans of written sentences: for each label the mean over tokens of those about it minus the neutral ones'.

    Args:
        model: the model.
        layer: whose neurons.
        sentences: with texts on both sides.

    Returns:
        A direction for each, in their order.
    """
    texts = [text for one in sentences for text in (*one.activating, *one.neutral)]
    samples = [Sample(str(i), text) for i, text in enumerate(texts)]
    store = collect(model, samples, [layer], progress=False)
    activations, text_of = store.layer(layer).float(), store.samples(layer)

    def mean(first: int, count: int) -> Tensor:
        return activations[(text_of >= first) & (text_of < first + count)].mean(0)

    vectors, first = [], 0
    for one in sentences:
        middle = first + len(one.activating)
        vectors.append(mean(first, len(one.activating)) - mean(middle, len(one.neutral)))
        first = middle + len(one.neutral)
    return ProjectionDictionary("diffmeans", torch.stack(vectors), tuple(one.label for one in sentences))
