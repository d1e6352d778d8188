"""A run's layer, taken apart by several methods on the same texts, and what each is worth: detection and steering.

    trial = Trial.open(run, model, Plan(k=100, against=("diffmeans", "sae", "neuron", "random")))
    trial.detect(12)                                  # [ConceptDetection], the first is SNMF's
    trial.repetition(1).detect(12)                    # the same with another division of the texts and other starts
    for record in trial.steer(12, scorers, ("weather", "physics")):
        ...

Everything is fitted, matched and trained on half of the texts (``Plan.seed`` decides which). What is finished is kept
in ``DIR/eval`` and is not done again:

    plan.json                        the options that shape the numbers
    unsteered.json                   the texts that steered ones are compared with
    layer_6/snmf.safetensors         the factorisation of the training texts; others beside it
    layer_6/sae-10/                  an autoencoder, as SAELens writes it
    layer_6/detection.json           of each method and concept the direction and its held-out scores
    layer_6/matches.json             each method's best detectors of each concept, and how it detects
    layer_6/steering/METHOD/CONCEPT.json
    layer_6/immediate/METHOD/CONCEPT.json
    layer_6/steering-both-signs/METHOD/CONCEPT.json        likewise immediate-both-signs
    seed-1/layer_6/...               fits and detection of repetition 1, whose seed is one more than the plan's
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files
from .attempts import FORMAT, kept_attempt, kept_unsteered, open_plan
from .autoencoders import AutoencoderDictionary, load_autoencoder, save_autoencoder, train_autoencoder
from .detecting import ConceptDetection, detect_concepts, hard_negatives
from .dictionaries import NeuronDictionary, difference_of_means, features, random_groups
from .evaluation import EPS, auroc, shuffle_labels, split_texts
from .immediate import VERSION as IMMEDIATE_VERSION
from .immediate import ImmediateEffect, ImmediateMeter, Vocabulary
from .runs import versions
from .steering_protocol import Protocol, SteeringRecord, Unsteered, aim, direction_digest, steer_concept
from .text_scoring import Scorer, concept_words
from .texts import read_texts
from .words import stored_texts

if TYPE_CHECKING:
    import snmf_kernels

    from .dictionaries import Dictionary
    from .models import LanguageModel
    from .runs import Run

logger = logging.getLogger(__name__)

# Other factorisations of the same size; they differ from the plan's in what they name.
VARIANTS: dict[str, dict[str, Any]] = {
    "snmf-raw": {"neuron_scale": None},
    "snmf-norefit": {"refit": False},
    "snmf-sparse": {"refit": False, "max_active": 10},
    "snmf-paper": {"solver": "mu", "neuron_scale": None, "init": "random", "max_iter": 4000},
}
RIVALS = ("diffmeans", "sae", "neuron", "random", "permuted", *VARIANTS)
# The autoencoder of the plan's size is trained with each of these shares of its latents active, and with as many
# as the factorisation has positive coefficients a token; what detects best on the training texts is taken.
_ACTIVE_SHARES = (0.02, 0.05, 0.1, 0.3)
# Best detectors that are kept for each concept, as candidates for steering.
_MATCHES = 20
# Words of its own that a concept must have for text to be scored by them.
LEAST_WORDS = 3
_WORDS = "concept_words.json"
# Of how the numbers in detection.json are computed; those of another version are computed again.
_DETECTION_VERSION = "1"


@dataclass(frozen=True)
class Plan:
    """What is compared; every field shapes the numbers.

    Attributes:
        k: features, and latents of the autoencoder.
        against: rivals, of :data:`RIVALS`: ``diffmeans``, ``sae`` (one trained here), ``neuron``, ``random``,
            ``permuted`` (SNMF with shuffled labels; detection only), and other factorisations.
        sae: a published or saved autoencoder, see :func:`snmf_interp.autoencoders.load_autoencoder`; joins as
            ``sae-NAME``. ``{layer}`` in it stands for the layer's number.
        fit: further options of :func:`snmf_kernels.fit`, JSON values.
        seed: of the division of the texts, the fits and the controls.
        protocol: of steering.
    """

    k: int = 100
    against: tuple[str, ...] = ("diffmeans", "neuron", "random")
    sae: str | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    protocol: Protocol = field(default_factory=Protocol)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: wanted at least 1, got {self.k}")
        if unknown := [name for name in self.against if name not in RIVALS]:
            raise ValueError(f"against: wanted some of {', '.join(RIVALS)}, got {unknown[0]!r}")
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"against: wanted each rival once, got {', '.join(self.against)}")


@dataclass
class _Detections:
    """What detection keeps of a layer, by method."""

    rows: dict[str, ConceptDetection] = field(default_factory=dict)
    made_by: dict[str, dict[str, Any]] = field(default_factory=dict)
    matches: dict[str, Any] = field(default_factory=dict)

    def has(self, name: str, rival: Dictionary) -> bool:
        """Whether there is a row of this name, and of the directions that the rival has now."""
        row = self.rows.get(name)
        return (
            row is not None
            and int(row.detection.feature.max()) < rival.size
            and self.made_by.get(name) == _made_by(rival, row)
        )


class Trial:
    """A comparison in a run's folder; get one from :meth:`open`."""

    def __init__(self, run: Run, model: LanguageModel, plan: Plan, folder: Path) -> None:
        self.run, self.model, self.plan, self.folder = run, model, plan, folder
        self._rivals: dict[int, list[Dictionary]] = {}
        self._meters: dict[int, ImmediateMeter] = {}

    @classmethod
    def open(
        cls, run: Run, model: LanguageModel, plan: Plan, *, steering: bool = True, overwrite: bool = False
    ) -> Trial:
        """Begin a comparison, or go on with it.

        More rivals than before are added to what is there.

        Args:
            run: collected activations of labelled texts.
            model: the model that they are of.
            plan: what is compared.
            steering: whether :meth:`steer` will be called; else the plan's protocol says nothing, and what is there
                of another protocol stays.
            overwrite: replace a comparison of another plan.

        Raises:
            ValueError: the texts have fewer than two labels, the model is another, or the folder has a comparison
                of another plan.
        """
        run.check_model(model)
        if len({label for label in run.store().corpus.labels if label is not None}) < 2:
            raise ValueError(
                f"texts: wanted texts of at least two labels, but {run.config['texts']['source']!r} has fewer; "
                "collect from labelled texts, such as `concepts`"
            )
        folder = run.path / "eval"
        wanted = asdict(plan) | {"equal_texts": run.store().corpus.n_equal}
        # Rivals do not depend on each other.
        del wanted["against"], wanted["sae"]
        if (folder / "plan.json").is_file():
            there = files.read_versioned(folder / "plan.json", FORMAT)
            # Detection has no protocol of its own, and steering may begin after it.
            if not steering:
                wanted["protocol"] = there["protocol"]
        elif not steering:
            wanted["protocol"] = None
        open_plan(folder, wanted, overwrite=overwrite)
        return cls(run, model, plan, folder)

    def repetition(self, number: int) -> Trial:
        """The same comparison with the plan's seed plus ``number``: another division of the texts, other starts.

        It is kept apart, and is for detection: only repetition 0, which is this one, steers.

        Raises:
            ValueError: ``number`` is below 0.
        """
        if number < 0:
            raise ValueError(f"number: wanted at least 0, got {number}")
        if not number:
            return self
        seed = self.plan.seed + number
        found = Trial(self.run, self.model, replace(self.plan, seed=seed), self.folder / f"seed-{seed}")
        found.texts = self.texts
        return found

    @cached_property
    def labels(self) -> list[str | None]:
        """The label of each text."""
        return self.run.store().corpus.labels

    @cached_property
    def texts(self) -> list[str]:
        """The texts, from their tokens."""
        return list(stored_texts(self.run.store(), self.model))

    @cached_property
    def train(self) -> Tensor:
        """Which texts are training texts, ``[n_texts]`` bool; equal ones are on one side."""
        return split_texts(self.labels, groups=self.run.store().corpus.groups, seed=self.plan.seed)

    @property
    def has_bundled_words(self) -> bool:
        """Whether :attr:`words` are those bundled with the corpus."""
        return bool(self.run.config["texts"]["source"] == "concepts")

    @cached_property
    def words(self) -> dict[str, tuple[str, ...]]:
        """The words by which steered text is told to be about a concept; only concepts that have some.

        For the bundled corpus a bundled list, written from the concepts' names before anything was steered: its
        texts are too few and too varied to have words of their own. Else :func:`concept_words` of the training
        texts, of concepts with at least :data:`LEAST_WORDS`.
        """
        known = {label for label in self.labels if label is not None}
        if self.has_bundled_words:
            bundled = bundled_words()
            return {name: words for name, words in bundled.items() if name in known}
        found = concept_words(self.texts, self.labels, self.train)
        return {name: words for name, words in found.items() if len(words) >= LEAST_WORDS}

    @cached_property
    def _hard(self) -> dict[str, Tensor]:
        return hard_negatives(self.texts, self.labels, self.train)

    def rivals(self, layer: int) -> list[Dictionary]:
        """SNMF and the plan's rivals, made on the training texts, in the plan's order."""
        if layer in self._rivals:
            return self._rivals[layer]
        store = self.run.store()
        activations, text_of = store.layer(layer), store.samples(layer)
        ours = activations[self.train[text_of]]
        factors = self._factors(layer, "snmf", ours, {})
        found: list[Dictionary] = [features(factors)]
        for name in self.plan.against:
            if name == "diffmeans":
                scale = found[0].scale  # type: ignore[attr-defined]  # features are ProjectionDictionaries
                found.append(difference_of_means(activations, text_of, self.labels, self.train, scale=scale))
            elif name == "neuron":
                found.append(NeuronDictionary(activations.shape[1]))
            elif name == "random":
                found.append(random_groups(factors, seed=self.plan.seed))
            elif name == "sae":
                found.append(self._autoencoder(layer, factors, activations, text_of))
            elif name in VARIANTS:
                found.append(features(self._factors(layer, name, ours, VARIANTS[name]), name))
        if self.plan.sae is not None:
            public = load_autoencoder(self.plan.sae.replace("{layer}", str(layer)), self.model, layer)
            name = "sae-" + re.sub(r"[^\w.-]+", "-", self.plan.sae).strip("-")
            found.append(AutoencoderDictionary(public.sae, name, None, public.output, public.write))
        self._rivals[layer] = found
        return found

    def detect(self, layer: int) -> list[ConceptDetection]:
        """How each method detects the concepts of the held-out texts; SNMF first, ``permuted`` last.

        What was found before of the same directions is read, not computed again.
        """
        store = self.run.store()
        activations, text_of = store.layer(layer), store.samples(layer)
        folder = self.folder / f"layer_{layer}"
        kept = _read_detections(folder)
        rows: dict[str, ConceptDetection] = {}
        found = _Detections()
        for rival in self.rivals(layer):
            names = [rival.name]
            if rival.name == "snmf" and "permuted" in self.plan.against:
                names.append("permuted")
            if rival.name in kept.matches and all(kept.has(name, rival) for name in names):
                rows |= {name: kept.rows[name] for name in names}
                continue
            scores = rival.scores(activations, text_of, len(self.labels))
            found.matches[rival.name] = self._best(rival, scores)
            for name in names:
                labels, hard = self.labels, self._hard
                if name == "permuted":
                    labels = shuffle_labels(self.labels, self.train, seed=self.plan.seed)
                    hard = hard_negatives(self.texts, labels, self.train)
                row = detect_concepts(rival, activations, text_of, labels, self.train, hard, scores=scores)
                rows[name] = found.rows[name] = replace(row, method=name)
                found.made_by[name] = _made_by(rival, row)
        if found.rows:
            with files.keeping("detections", self.run.path), files.locked(folder):
                _write_detections(folder, found)
        if "permuted" in rows:
            rows["permuted"] = rows.pop("permuted")
        return list(rows.values())

    def steer(
        self,
        layer: int,
        scorers: Sequence[Scorer],
        concepts: Sequence[str],
        *,
        both_signs: bool = False,
        before: Callable[[str, str], None] | None = None,
    ) -> Iterator[SteeringRecord]:
        """Each method's attempt to steer to each concept, concept by concept; see :func:`steer_concept`.

        Without scorers no texts are written: the records have a direction and strengths, which :meth:`immediate` needs.

        Args:
            layer: a collected layer.
            scorers: who scores the texts, or none.
            concepts: labels that the scorers know.
            both_signs: whether each method but DiffMeans may also take the negative of its directions.
            before: called with method and concept of each attempt that has not been made before.

        Raises:
            ValueError: a concept is not among those of the training texts.
        """
        path = self.folder / f"layer_{layer}" / "matches.json"
        rivals = self.rivals(layer)
        matches = files.read_versioned(path, FORMAT)["matches"] if path.is_file() else {}
        if any(rival.name not in matches for rival in rivals):
            self.detect(layer)
            matches = files.read_versioned(path, FORMAT)["matches"]
        if unknown := [name for name in concepts if name not in matches["snmf"]]:
            raise ValueError(f"concepts: {unknown[0]!r} is no label of the training texts")
        for concept in concepts:
            for rival in rivals:

                def make(rival: Dictionary = rival, concept: str = concept) -> SteeringRecord:
                    if before:
                        before(rival.name, concept)
                    candidates = [(index, area) for index, area in matches[rival.name][concept]]
                    protocol, meter = self.plan.protocol, self._meter(layer)
                    if not scorers:
                        return aim(
                            self.model, layer, rival, candidates, concept, protocol,
                            meter=meter, both_signs=both_signs,
                        )  # fmt: skip
                    return steer_concept(
                        self.model,
                        layer,
                        rival,
                        candidates,
                        concept,
                        scorers,
                        protocol,
                        self.plain,
                        meter=meter,
                        both_signs=both_signs,
                        permuted=tuple(self.words),
                    )

                def is_done(record: SteeringRecord, rival: Dictionary = rival) -> bool:
                    # Not where the method was fitted anew since.
                    digest = direction_digest(rival.direction(record.chosen))
                    return record.made_by.get("direction") == digest and record.is_by(scorers)

                # A direction that was made for the concept has one sign in either case.
                choice = both_signs and rival.concepts is None
                folder = self._of_signs(layer, "steering", choice) / rival.name
                record = kept_attempt(folder / f"{concept}.json", is_done, make)
                yield replace(record, both_signs=both_signs)

    def immediate(self, records: Sequence[SteeringRecord]) -> list[tuple[ImmediateEffect, ...]]:
        """What the directions of steering records do to the next token, without sampling; see :class:`ImmediateMeter`.

        The words of all concepts of the texts that have some are watched under all of them.

        Args:
            records: from :meth:`steer`, of any layers.

        Returns:
            The effects of each record in its place; none where no word of its concept is a single token.
        """
        protocol = self.plan.protocol
        prompts = [protocol.choosing, protocol.reporting]
        digest = hashlib.sha256(repr((sorted(self.words.items()), prompts)).encode()).hexdigest()[:16]
        found = []
        for record in records:
            rival = next(one for one in self.rivals(record.layer) if one.name == record.method)
            choice = record.both_signs and rival.concepts is None
            done = (
                self._of_signs(record.layer, "immediate", choice) / record.method / f"{record.concept}.json"
            )
            made_by = {
                "version": IMMEDIATE_VERSION,
                "words": digest,
                "direction": record.made_by["direction"],
                "sign": record.sign,
                "targets": list(protocol.targets),
            }
            there = files.read_json(done) if done.is_file() else {}
            if there.get("made_by") != made_by:
                meter = self._meter(record.layer)
                effects = () if meter is None else meter.measure(record, rival.direction(record.chosen))
                there = {"made_by": made_by, "effects": [asdict(effect) for effect in effects]}
                done.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(done, there)
            found.append(tuple(ImmediateEffect(**effect) for effect in there["effects"]))
        return found

    def _of_signs(self, layer: int, kind: str, both_signs: bool) -> Path:
        return self.folder / f"layer_{layer}" / (f"{kind}-both-signs" if both_signs else kind)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        protocol = self.plan.protocol
        return Vocabulary.of(self.model, self.words, [*protocol.choosing, *protocol.reporting])

    def _meter(self, layer: int) -> ImmediateMeter | None:
        """None where no concept has a word that is a single token."""
        if layer not in self._meters and self._vocabulary.words:
            self._meters[layer] = ImmediateMeter(self.model, layer, self._vocabulary, self.plan.protocol)
        return self._meters.get(layer)

    @cached_property
    def plain(self) -> Unsteered:
        """The texts that the model writes without steering."""
        return kept_unsteered(self.folder / "unsteered.json", self.model, self.plan.protocol)

    def _best(self, rival: Dictionary, scores: Tensor) -> dict[str, list[tuple[int, float]]]:
        """Each concept's best directions by AUROC on training texts, the lowest index first among equals."""
        ours = [label for label, chosen in zip(self.labels, self.train.tolist(), strict=True) if chosen]
        names, areas = auroc(scores[:, self.train], ours)
        found = {}
        for column, name in enumerate(names):
            if rival.concepts is not None:
                order = [rival.concepts.index(name)] if name in rival.concepts else []
            else:
                # A stable sort, so that ties are broken by index.
                order = areas[:, column].argsort(descending=True, stable=True).tolist()
            # A dead feature has no direction.
            alive = (index for index in order if bool(rival.direction(index).any()))
            found[name] = [(index, float(areas[index, column])) for index in islice(alive, _MATCHES)]
        return found

    def _factors(
        self, layer: int, name: str, ours: Tensor, options: Mapping[str, Any]
    ) -> snmf_kernels.Factorization:
        import snmf_kernels

        path = self.folder / f"layer_{layer}" / f"{name}.safetensors"
        if path.is_file():
            try:
                return snmf_kernels.Factorization.load(path)
            except ValueError as error:
                logger.warning("%s of layer %d is fitted again: %s", name, layer, error)
        chosen: dict[str, Any] = (
            {"neuron_scale": "rms", "seed": self.plan.seed} | dict(self.plan.fit) | dict(options)
        )
        factors = snmf_kernels.fit(ours.float().T, self.plan.k, **chosen)
        with files.keeping("fits", self.run.path):
            factors.save(path)
        # As a later call finds it, to the bit.
        return snmf_kernels.Factorization.load(path) if path.is_file() else factors

    def _autoencoder(
        self, layer: int, factors: snmf_kernels.Factorization, activations: Tensor, text_of: Tensor
    ) -> AutoencoderDictionary:
        """Of autoencoders of several sparsities the one that detects best on the training texts."""
        k = self.plan.k
        same = round(float((torch.as_tensor(factors.Y) > 0).float().sum(0).mean()))
        scale = None if factors.neuron_scale is None else torch.as_tensor(factors.neuron_scale).cpu().float()
        ours = self.train[text_of]
        labels = [label for label, chosen in zip(self.labels, self.train.tolist(), strict=True) if chosen]
        best: tuple[float, AutoencoderDictionary] | None = None
        for active in sorted(
            {min(max(1, count), k) for count in (*(round(s * k) for s in _ACTIVE_SHARES), same)}
        ):
            folder = self.folder / f"layer_{layer}" / f"sae-{active}"
            rival = None
            if not folder.is_dir():
                rival = train_autoencoder(
                    activations[ours].T, k, active=active, neuron_scale=scale, seed=self.plan.seed
                )
                with files.keeping("autoencoders", self.run.path):
                    save_autoencoder(rival, folder)
            if rival is None or folder.is_dir():
                rival = AutoencoderDictionary(load_autoencoder(str(folder)).sae, scale=scale)
            scores = rival.scores(activations, text_of, len(self.labels))
            value = float(auroc(scores[:, self.train], labels)[1].amax(0).mean())
            if best is None or value > best[0]:
                best = value, rival
        assert best is not None  # there is at least one sparsity
        return best[1]


def _made_by(rival: Dictionary, row: ConceptDetection) -> dict[str, Any]:
    chosen = torch.stack([rival.direction(index) for index in row.detection.feature.tolist()])
    return {
        "version": _DETECTION_VERSION,
        "choices": row.size,
        "directions": direction_digest(chosen),
    }


def _read_detections(folder: Path) -> _Detections:
    """What is kept of a layer; nothing where a file is damaged, so that it is made again."""
    path, matches = folder / "detection.json", folder / "matches.json"
    found = _Detections()
    try:
        if matches.is_file():
            found.matches = files.read_versioned(matches, FORMAT)["matches"]
        if path.is_file():
            content = files.read_versioned(path, FORMAT)
            # Earlier versions did not say of which directions they are.
            found.made_by = content.get("made_by", {})
            found.rows = {
                name: ConceptDetection.from_concepts(name, made_by["choices"], content["methods"][name])
                for name, made_by in found.made_by.items()
            }
    except ValueError as error:
        logger.warning("concepts are detected again: %s", error)
        return _Detections()
    return found


def _write_detections(folder: Path, found: _Detections) -> None:
    """Add methods to those that are kept."""
    there = _read_detections(folder)
    files.write_json(folder / "matches.json", {"format": FORMAT, "matches": there.matches | found.matches})
    rows = there.rows | found.rows
    content = {
        "format": FORMAT,
        "versions": versions(),
        "eps": EPS,
        "made_by": there.made_by | found.made_by,
        "methods": {name: row.by_concept() for name, row in rows.items()},
    }
    files.write_json(folder / "detection.json", content)


def bundled_words() -> dict[str, tuple[str, ...]]:
    """For most concepts of the bundled corpus the words by which text is told to be about them."""
    text = resources.files("snmf_interp.data").joinpath(_WORDS).read_text(encoding="utf-8")
    return {name: tuple(words.split()) for name, words in json.loads(text).items()}


def collect_run(
    folder: Path, model: LanguageModel, layers: str, source: str = "concepts", **options: Any
) -> Run:
    """The run in a folder, collected if it is not there or not finished; see :meth:`Run.collect`."""
    from .runs import Run

    return Run.collect(folder, model, read_texts(source), layers, texts=source, **options)
