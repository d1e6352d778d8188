"""The words that set a feature apart from the corpus: a label without any model, the same on every machine.

Words are counted at the feature's strongest tokens, and in their contexts, and compared with the whole corpus
by log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008, "Fightin' Words", Political
Analysis 16(4), section 3.5.1). Runs of letters and digits count as words, vowel signs with their letters, so text of
scripts without spaces is not divided well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from .features import Feature, TokenInContext
    from .models import LanguageModel
    from .store import ActivationStore

# Of the method below; goes into the record of a run.
VERSION = 2
# A word with its apostrophes, or one mark, as people see it: an emoji with its modifiers is one.
_WORD = regex.compile(r"\w+(?:['’]\w+)*|(?=[^\w\s])\X")
_LETTERS = regex.compile(r"[\p{Letter}\p{Mark}\p{Join_Control}]+")
# What the prior weighs, in words of the feature: as much as the tokens of a feature and their contexts.
_PRIOR = 500.0
# Standard deviations from which a word is listed. Function words and marks stand at many tokens of every late
# layer, and are listed only where they are what the feature is about.
_LISTED, _LISTED_FUNCTION = 2.0, 5.0
# The words of a context are listed where the tokens have fewer words of their own, and only those of two texts.
_FEW = 3
FUNCTION_WORDS = frozenset(  # as prose, for a list of strings of them would fill a page
    """
    a an the and or but nor so yet if then than as because while when where whether though although unless until
    since before after of in on at by for with from to into onto over under above below between among through across
    during about against along around behind beside beyond off out up down upon within without i me my mine myself we
    us our ours you your yours he him his she her hers it its they them their theirs this that these those who whom
    whose which what there here am is are was were be been being have has had having do does did doing will would
    shall should can could may might must not no some any all both each every either neither another such same own
    only just even also too very more most much many few less least how why
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Word:
    """A distinctive word: as it is mostly written, by how many standard deviations, and from where.

    ``peak`` says that the tokens themselves are this word; else it stands near them.
    """

    text: str
    z: float
    peak: bool


def split_words(text: str) -> list[str]:
    """The words and marks of a text, as they are written."""
    found: list[str] = _WORD.findall(text)
    return found


def is_letters(text: str) -> bool:
    """Whether a text is letters alone, with the vowel signs and accents that they have."""
    return _LETTERS.fullmatch(text) is not None


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, case ignored."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(map(str.casefold, split_words(text)))
    return counts


def corpus_words(store: ActivationStore, model: LanguageModel) -> Counter[str]:
    """:func:`count_words` of the texts of a store."""
    return count_words(stored_texts(store, model))


def stored_texts(store: ActivationStore, model: LanguageModel) -> Iterator[str]:
    """The texts of a store, decoded from their tokens without special ones."""
    corpus = store.corpus
    for sample in range(len(corpus.sample_ids)):
        ids = [token for token in corpus.tokens_of(sample) if token not in model.special_ids]
        yield model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def log_odds(
    counts: Mapping[str, float], corpus: Mapping[str, float], *, prior: float = _PRIOR
) -> dict[str, float]:
    """By how many standard deviations words are commoner in ``counts`` than in the corpus.

    With counts y, their sum n, and α the prior, which has the corpus's proportions and the sum α₀::

        δ = log (y + α) / (n + α₀ − y − α) − log (b + α) / (N + α₀ − b − α)
        z = δ / sqrt(1 / (y + α) + 1 / (b + α))

    where b and N are those of the corpus. A word that the corpus lacks counts as if it were as common there:
    what is compared is taken to be a part of the corpus.

    Args:
        counts: of the words to be compared; fractions are allowed.
        corpus: of all words.
        prior: α₀.

    Returns:
        z of each word of ``counts``.

    Raises:
        ValueError: the corpus is empty, or ``prior`` is not above 0.
    """
    total = sum(corpus.values())
    if not total > 0:
        raise ValueError("corpus: wanted counts of words, got none")
    if not prior > 0:
        raise ValueError(f"prior: wanted a number above 0, got {prior}")
    n = sum(counts.values())
    scores = {}
    for word, y in counts.items():
        b = corpus.get(word, 0) or y
        alpha = prior * b / total
        # A corpus of one word leaves nothing to compare with.
        here, there = n + prior - y - alpha, total + prior - b - alpha
        if here <= 0 or there <= 0:
            scores[word] = 0.0
            continue
        delta = math.log((y + alpha) / here) - math.log((b + alpha) / there)
        scores[word] = delta / math.sqrt(1 / (y + alpha) + 1 / (b + alpha))
    return scores


def input_words(feature: Feature, corpus: Mapping[str, float], *, count: int = 5) -> list[Word]:
    """The words that a feature fires on, or near, more than the corpus would have it.

    A token counts as the whole word that it is a piece of, with its strength, in units of the mean over the
    feature's tokens, as weight. Where fewer than three words stand out so, words of the contexts follow.

    Args:
        feature: the feature.
        corpus: from :func:`corpus_words`.
        count: the most words.

    Returns:
        Words of tokens first, then of contexts, by falling z, ties by spelling. Empty if none stands out.
    """
    return context_words(feature.tokens, corpus, count=count)


def context_words(
    tokens: Sequence[TokenInContext], corpus: Mapping[str, float], *, count: int = 5
) -> list[Word]:
    """:func:`input_words` of tokens in context."""
    if not tokens:
        return []
    peaks: dict[str, float] = {}
    near: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    mean = sum(token.strength for token in tokens) / len(tokens)
    for token in tokens:
        at, around = _words_of(token)
        for word in at:
            peaks[word.casefold()] = peaks.get(word.casefold(), 0.0) + token.strength / mean
        near.update(word.casefold() for word in around)
        texts.update({word.casefold() for word in around})
        for word in at + around:
            spellings.setdefault(word.casefold(), Counter())[word] += 1
    z_peak, z_near = log_odds(peaks, corpus), log_odds(near, corpus)

    def listed(key: str, z: float, peak: bool) -> list[Word]:
        least = _LISTED_FUNCTION if is_function_word(key) else _LISTED
        commonest = min(spellings[key], key=lambda spelling: (-spellings[key][spelling], spelling))
        return [Word(commonest, z, peak)] if z >= least else []

    at_peaks = [word for key, z in z_peak.items() for word in listed(key, z, True)]
    around_them = [
        word
        for key, z in z_near.items()
        if key not in peaks and len(key) > 1 and texts[key] > 1 and not is_function_word(key)
        for word in listed(key, z, False)
    ]
    content = [word for word in at_peaks if not is_function_word(word.text)]
    words = sorted(at_peaks, key=_rank)
    if len(content) < _FEW:
        words = words[: max(count - _FEW, 1)] + sorted(around_them, key=_rank)
    return words[:count]


def output_words(feature: Feature, corpus: Mapping[str, float], *, count: int = 5) -> list[Word]:
    """The readable words among those that a feature makes likelier, most unusual first.

    Of its measured effects, with the change of their logits, where there are some; else of the logit lens where that
    holds (:attr:`Feature.lens_holds`), with the z of ``Feature.distinctive`` (``promoted`` stands in for it in a layer
    of one or two features, where nothing stands out). Vocabularies hold many pieces of words: a token is taken for a
    word if it begins with a space or the corpus has it as one. Variants that differ in case or space count once.
    """
    words: dict[str, Word] = {}
    lens = (feature.distinctive or feature.promoted) if feature.lens_holds else ()
    for token, value in feature.effects.raised if feature.effects else lens:
        text = token.strip()
        key = text.casefold()
        whole = token[:1].isspace() or key in corpus
        if is_letters(text) and len(text.encode()) > 2 and whole and not is_function_word(key):
            words.setdefault(key, Word(text, value, False))
    return list(words.values())[:count]


def is_function_word(word: str) -> bool:
    """Whether a word is English grammar rather than content, or a mark; contractions count as their first part."""
    head = re.split("['’]", word.casefold())[0]
    return not word[:1].isalnum() or head in FUNCTION_WORDS or head.removesuffix("n") in FUNCTION_WORDS


def _rank(word: Word) -> tuple[float, str]:
    return -word.z, word.text


def _words_of(token: TokenInContext) -> tuple[list[str], list[str]]:
    """The words that the token is (a piece of), and those around it that the window does not cut."""
    text = token.before + token.token + token.after
    begin = len(token.before) + len(token.token) - len(token.token.lstrip())
    end = max(len(token.before) + len(token.token.rstrip()), begin)
    at, around = [], []
    for match in _WORD.finditer(text):
        if match.start() < end and match.end() > begin:
            at.append(match[0])
        elif not (
            (token.cut_before and match.start() == 0) or (token.cut_after and match.end() == len(text))
        ):
            around.append(match[0])
    # Some tokenizers cut numbers off their space: the token is then blank, and stands for what follows.
    if not at and not token.token.strip():
        following = _WORD.match(text, begin)
        at = [following[0]] if following else []
    return at, around
