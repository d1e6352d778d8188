"""Scores of steered text: whether it turned to a concept, and whether it still reads; by words or by a judge.

    words = concept_words(texts, labels, train)
    scorer = WordScorer(model, words, unsteered)
    scorer.score(steered, "weather")[0].score          # 0 to 2, as a judge's

Both scales are the paper's (Shafran, Geiger & Geva, arXiv:2506.10920): 0, 1 or 2 for the concept, 0 to 2 for fluency,
and a text's score is their harmonic mean.
"""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import hooks, prompts
from .judging import Judgement, judge
from .words import count_words, is_function_word, log_odds, split_words

if TYPE_CHECKING:
    from .answers import ChatModel
    from .generation import Continuation
    from .models import LanguageModel

# A word of a concept is commoner in its texts than elsewhere by two standard deviations; of a few texts, no more
# words than these are worth having.
_LEAST_Z, _MOST_WORDS = 2.0, 20
# The prior weighs a quarter of the concept's words, so that few texts have words too, and no more than this many.
_MOST_PRIOR = 500.0
# Runs of this many words that come again count as repetition.
_RUN = 3


class TextScore(Protocol):
    """A text's scores: 0 to 2 each, None where there is none; ``unanswered`` if asking again may give one."""

    @property
    def concept(self) -> float | None: ...

    @property
    def fluency(self) -> float | None: ...

    @property
    def score(self) -> float | None: ...

    @property
    def unanswered(self) -> bool: ...


class Scorer(Protocol):
    """Scores texts for a concept.

    Attributes:
        name: for tables, such as ``"words"``.
        identity: says all that its scores of a text depend on; scores of another identity are not kept.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def score(
        self, texts: Sequence[Continuation], concept: str, *, complete: bool = False
    ) -> Sequence[TextScore]:
        """The texts' scores; with ``complete`` fluency too where the concept's 0 makes the score 0 without it."""
        ...


@dataclass(frozen=True)
class WordScore:
    """A text's scores by words.

    Attributes:
        concept: 0 without any of the concept's words, 1 with one of them, 2 with two or more different ones.
        fluency: 0 to 2, see :class:`WordScorer`; None where it was not needed.
    """

    concept: float
    fluency: float | None

    @property
    def score(self) -> float:
        """The harmonic mean, 0 where either is 0."""
        if not self.concept or not self.fluency:
            return 0.0
        return 2 * self.concept * self.fluency / (self.concept + self.fluency)

    @property
    def unanswered(self) -> bool:
        """Never: nobody is asked."""
        return False


def concept_words(
    texts: Sequence[str], labels: Sequence[str | None], train: Tensor, *, count: int = _MOST_WORDS
) -> dict[str, tuple[str, ...]]:
    """The words that set a concept's training texts apart from all training texts, case ignored.

    Log-odds with a Dirichlet prior (:func:`snmf_interp.words.log_odds`), at least two standard deviations, most
    distinctive first; function words and marks left out, and words that only one of the concept's texts has while
    another concept has them too.

    Args:
        texts: all texts.
        labels: the label of each; unlabelled texts count as others.
        train: which may be used, ``[n_texts]`` bool.
        count: the most words of a concept.

    Returns:
        The words of each label of a training text; perhaps none.
    """
    usable = [i for i, chosen in enumerate(train.tolist()) if chosen]
    corpus = count_words(texts[i] for i in usable)
    found = {}
    for name in sorted({str(labels[i]) for i in usable if labels[i] is not None}):
        own = [texts[i] for i in usable if labels[i] == name]
        counts = count_words(own)
        spread = count_words(" ".join(dict.fromkeys(map(str.casefold, split_words(text)))) for text in own)
        z = log_odds(counts, corpus, prior=min(_MOST_PRIOR, sum(counts.values()) / 4))
        kept = [
            word
            for word in counts
            if z[word] >= _LEAST_Z
            and not is_function_word(word)
            and (spread[word] > 1 or counts[word] == corpus[word])
        ]
        found[name] = tuple(sorted(kept, key=lambda word: (-z[word], word))[:count])
    return found


class WordScorer:
    """Scores without a judge: a concept by its words, fluency by likelihood and repetition.

    Fluency is ``2 · l · r``. l places the text's mean log-probability a token, under a model that is *not*
    steered, between the medians of unsteered texts (1) and of the same texts with their words shuffled (0). r is
    the share of three-word runs that are new in the text, over that of the unsteered texts' lowest tenth, at most 1:
    for loops are likely text. So text as the model writes it has 2, and a list of likely words or a loop has about 0.

    Args:
        model: the model that judges likelihood. The steered one itself, without steering, or better another.
        words: of each concept, from :func:`concept_words`.
        unsteered: continuations without steering, at least two.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: there are fewer than two unsteered texts of four words, or shuffling does not make them less
            likely.
    """

    name = "words"

    def __init__(
        self,
        model: LanguageModel,
        words: Mapping[str, Sequence[str]],
        unsteered: Sequence[Continuation],
        *,
        batch_size: int = 8,
    ) -> None:
        self.model, self.words, self.batch_size = model, {k: set(v) for k, v in words.items()}, batch_size
        clean = [one for one in unsteered if len(split_words(one.text)) > _RUN]
        if len(clean) < 2:
            raise ValueError(
                f"unsteered: wanted at least two texts of more than {_RUN} words, got {len(clean)}; "
                "raise samples or max_new_tokens"
            )
        shuffled = [_shuffled(one.text, seed) for seed, one in enumerate(clean)]
        openings = [one.prompt for one in clean]
        self.high = statistics.median(self.log_probabilities(openings, [one.text for one in clean]))
        self.low = statistics.median(self.log_probabilities(openings, shuffled))
        if not self.high > self.low:
            raise ValueError(
                f"model: {model.name!r} finds shuffled text as likely as its own "
                f"({self.low:.2f} and {self.high:.2f} nats a token), and so cannot judge fluency"
            )
        fresh = sorted(_fresh(one.text) for one in clean)
        self.fresh = fresh[len(fresh) // 10]
        listed = sorted((name, sorted(words)) for name, words in self.words.items())
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
        scale = f"{self.low:.4f} to {self.high:.4f} nats, {self.fresh:.4f} new runs"
        self.identity = f"words 1, {digest}, {model.name}, {scale}"
        # Texts are scored for many concepts; reading them takes the time.
        self._fluencies: dict[tuple[str, str], float] = {}

    def score(
        self, texts: Sequence[Continuation], concept: str, *, complete: bool = False
    ) -> list[WordScore]:
        """A :class:`WordScore` for each text.

        Raises:
            ValueError: ``concept`` has no words.
        """
        if not self.words.get(concept):
            raise ValueError(f"concept: there are no words of {concept!r}")
        found = [min(self.hits(one.text, concept), 2) for one in texts]
        pairs = [(one.prompt, one.text) for one in texts]
        needed = [pair for pair, count in zip(pairs, found, strict=True) if count or complete]
        if unread := [pair for pair in dict.fromkeys(needed) if pair not in self._fluencies]:
            openings, continuations = zip(*unread, strict=True)
            for pair, likelihood in zip(unread, self.log_probabilities(openings, continuations), strict=True):
                self._fluencies[pair] = self._fluency(pair[1], likelihood)
        return [
            WordScore(float(count), self._fluencies.get(pair) if count or complete else None)
            for pair, count in zip(pairs, found, strict=True)
        ]

    def hits(self, text: str, concept: str) -> int:
        """How many different words of a concept a text has."""
        return len(self.words[concept] & set(map(str.casefold, split_words(text))))

    def log_probabilities(self, openings: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean log-probability a token of each text behind its opening, in nats; −inf for an empty text."""
        heads = [self.model.encode(opening) for opening in openings]
        whole = [self.model.encode(opening + text) for opening, text in zip(openings, texts, strict=True)]
        means = []
        for first in range(0, len(whole), self.batch_size):
            rows = whole[first : first + self.batch_size]
            ids, mask = hooks.pad(rows, side="right", pad_id=self.model.pad_id)
            logits = hooks.forward(self.model, ids, mask).logits
            for row, tokens, head in zip(logits, rows, heads[first : first + self.batch_size], strict=True):
                # A word across the border may be cut otherwise in the whole; what follows is the same.
                begin = min(len(head), len(tokens))
                predicted = row[begin - 1 : len(tokens) - 1].float().log_softmax(-1).cpu()
                chosen = predicted.gather(1, torch.tensor(tokens[begin:], dtype=torch.long)[:, None])
                means.append(float(chosen.mean()) if len(chosen) else float("-inf"))
        return means

    def _fluency(self, text: str, likelihood: float) -> float:
        natural = min(max((likelihood - self.low) / (self.high - self.low), 0.0), 1.0)
        return 2 * natural * min(_fresh(text) / self.fresh, 1.0) if self.fresh else 2 * natural


class JudgeScorer:
    """Scores by a language model as judge; see :mod:`snmf_interp.judging`. A failed judgement is missing."""

    name = "judge"

    def __init__(self, llm: ChatModel) -> None:
        self.llm = llm
        parameters = getattr(llm, "parameters", {})
        digests = ", ".join(map(prompts.digest, (prompts.CONCEPT, prompts.FLUENCY)))
        self.identity = f"judge 1, {llm.name}, {sorted(parameters.items())}, {digests}"

    def score(
        self, texts: Sequence[Continuation], concept: str, *, complete: bool = False
    ) -> list[Judgement]:
        """A judgement of each text, prompt and continuation together; always complete."""
        return judge([one.prompt + one.text for one in texts], concept.replace("_", " "), self.llm)


def mean_score(scores: Sequence[TextScore]) -> float | None:
    """The mean of the texts' scores, missing ones left out; None if all are missing."""
    known = [one.score for one in scores if one.score is not None]
    return sum(known) / len(known) if known else None


def _fresh(text: str) -> float:
    """The share of runs of three words that do not occur before in the text; 1 for a shorter text."""
    words = list(map(str.casefold, split_words(text)))
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def _shuffled(text: str, seed: int) -> str:
    words = split_words(text)
    random.Random(seed).shuffle(words)
    return " " + " ".join(words)
