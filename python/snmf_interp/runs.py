"""A run: one folder with the activations of a corpus, a factorisation per layer, and their features.

    config.json                     versions, model, texts, hook names, counts
    activations/                    see snmf_interp.store
    layer_6/factors.safetensors     snmf_kernels.Factorization
    layer_6/fit.json                the options of this fit and its outcome
    layer_6/features.jsonl          one snmf_interp.Feature a line
    layer_6/effects.safetensors     what features do to the next word, see snmf_interp.effects
    layer_6/labels/words.jsonl      one snmf_interp.Label a line, a file for each source, a manifest beside it
    words.json                      how often each word occurs in the texts
    tokens.json                     the text of each token that occurs
    llm/                            answers of language models as they came
    layer_6/tree/                   a snmf_interp.Hierarchy, how it was made, and what its features stand for
    layer_6/core/                   what neurons that groups of words share do to them, from snmf core
    layer_6/starts/                 fits from other starts, for snmf_interp.stability
    layer_6/k_evidence.json         what spoke for each k, for --k auto
    compare/                        what another checkpoint makes of the texts
    eval/                           other methods on the same texts, see snmf_interp.rivals

Every step may be cut short: what is finished is kept, and the same step done again does only what is missing. Several
commands may work on one run at once: a file that two of them change is locked while one does. Where a run may not be
written to, what is found from it is shown and not kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files

if TYPE_CHECKING:
    import snmf_kernels

    from .effects import Effects, WordEffects
    from .features import Feature
    from .levels import Hierarchy
    from .models import LanguageModel
    from .store import ActivationStore
    from .texts import Sample
    from .trees import Description, Place, Tree

logger = logging.getLogger(__name__)

# Below so many tokens for each feature, and so many different texts, a fit is warned of.
_TOKENS_PER_FEATURE, _FEW_TEXTS = 10, 30

FORMAT = 1
CONFIG, ACTIVATIONS, WORDS, TOKENS = "config.json", "activations", "words.json", "tokens.json"
_PACKAGES = ("snmf-kernels", "torch", "transformers", "tokenizers", "numpy", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run folder. Make one with :meth:`collect`, or :meth:`open` one."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def collect(
        cls,
        path: str | Path,
        model: LanguageModel,
        samples: Iterable[Sample | str | Mapping[str, Any]] | Mapping[str, Iterable[str]],
        layers: str | int | Sequence[int | str],
        *,
        texts: str = "",
        **options: Any,
    ) -> Run:
        """Collect the activations of a run, or finish a collection that was cut short.

        Args:
            path: the folder.
            model, samples, layers: see :func:`snmf_interp.collect`, as for ``options``.
            texts: where the samples came from, for the record.
        """
        from .activations import collect

        folder = Path(path)
        store = collect(model, samples, layers, out=folder / ACTIVATIONS, **options)
        config = {
            "format": FORMAT,
            "versions": versions(),
            "model": store.plan["model"] | {"weights": store.plan["options"]["weights"]},
            "texts": {
                "source": texts,
                "samples": store.counts["samples"],
                "digest": store.plan["options"]["texts"],
            },
            "hook_names": store.plan["hook_names"],
            "collect": store.plan["options"],
            "counts": store.counts,
        }
        there: dict[str, Any] = {}
        if (folder / CONFIG).is_file():
            with contextlib.suppress(ValueError):  # A damaged one is written anew.
                older = cls.open(folder)
                older._move_records()
                there = older.config
        if there != config:
            files.write_json(folder / CONFIG, config)
        return cls(folder, config)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run whose activations have been collected.

        Raises:
            FileNotFoundError: there is no run, or its collection has not finished.
            ValueError: the folder's config.json is damaged, or none of a run: a model's, for instance.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder; make it with "
                f"`snmf collect MODEL TEXTS --out {shlex.quote(str(folder))}`"
            )
        if not (folder / CONFIG).is_file():
            # Says whether nothing was begun or something is unfinished.
            from .store import ActivationStore

            ActivationStore.open(folder / ACTIVATIONS)
            raise FileNotFoundError(
                f"{folder} has no {CONFIG}; run the same collect command again to finish it"
            )
        if "format" not in (config := files.read_json(folder / CONFIG)):
            what = "a model's folder" if "model_type" in config or "architectures" in config else "no run"
            raise ValueError(
                f"{folder} is {what}: its {CONFIG} is not of `snmf collect`; "
                f"make a run with `snmf collect MODEL TEXTS --out DIR`, and give that"
            )
        return cls(folder, files.read_versioned(folder / CONFIG, FORMAT))

    @property
    def is_whole(self) -> bool:
        """Whether the activations are there, as they were collected; checksums are compared (0.3 s a GB)."""
        try:
            self.store().check()
        except (FileNotFoundError, ValueError):
            return False
        return True

    @property
    def model_facts(self) -> str:
        """The model in a line: its name, the file that it is from, and in which types its weights were stored."""
        model = self.config["model"]
        facts = [model["file"]] if model.get("file") else []
        if model.get("quantisation"):
            facts.append(f"weights quantised: {model['quantisation']}")
        return model["name"] + (f" ({'; '.join(facts)})" if facts else "")

    @property
    def layers(self) -> list[int]:
        """The layers whose activations are there."""
        return [int(layer) for layer in self.config["hook_names"]]

    @property
    def fitted(self) -> list[int]:
        """The layers that have been factorised."""
        return [layer for layer in self.layers if self.is_fitted(layer)]

    def is_fitted(self, layer: int) -> bool:
        """Whether ``layer`` has been factorised."""
        recorded = self._record_path(layer).is_file() or str(layer) in self._older_records
        return recorded and self.factors_path(layer).is_file()

    def record(self, layer: int) -> dict[str, Any]:
        """How a layer was factorised: options, outcome and versions, and what was noted of it; as it is now on disk.

        Raises:
            FileNotFoundError: the layer is not factorised.
        """
        self._check_fitted(layer)
        path = self._record_path(layer)
        if not path.is_file():
            older: dict[str, Any] = self._older_records[str(layer)]
            return older
        record = files.read_versioned(path, FORMAT)
        del record["format"]
        return record

    def parse_layers(
        self, layers: str | int | Iterable[int | str] | None, *, name: str = "layers"
    ) -> list[int]:
        """Collected layers named by ``"0-3,6"``, hook names of either naming, a number, a list, or ``"all"``/None.

        Args:
            layers: which.
            name: of the argument, for errors.

        Raises:
            ValueError: a part cannot be read, or names a layer that was not collected.
        """
        if layers is None:
            return self.layers
        parts = (
            layers.split(",") if isinstance(layers, str) else [layers] if isinstance(layers, int) else layers
        )
        hooks = {hook: int(layer) for layer, pair in self.config["hook_names"].items() for hook in pair}
        have = ", ".join(map(str, self.layers))
        found: set[int] = set()
        for part in filter(None, (str(part).strip() for part in parts)):
            first, _, last = part.partition("-")
            if part == "all":
                found.update(self.layers)
            elif part in hooks:
                found.add(hooks[part])
            elif first.isdigit() and (last.isdigit() or "-" not in part):
                found.update(range(int(first), int(last or first) + 1))
            else:
                raise ValueError(f"{name}: cannot read {part!r}; wanted numbers and ranges among {have}")
        if missing := sorted(found - set(self.layers)):
            raise ValueError(f"{name}: {missing[0]} was not collected; this run has {have}")
        if not found:
            raise ValueError(f"{name}: {layers!r} names no layer; this run has {have}")
        return sorted(found)

    def store(self) -> ActivationStore:
        """The activations."""
        from .store import ActivationStore

        return ActivationStore.open(self.path / ACTIVATIONS)

    def fit(
        self,
        layers: str | int | Iterable[int | str] | None,
        k: int,
        *,
        overwrite: bool = False,
        before_layer: Callable[[int], None] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Factorise layers one after another; a layer that has the same options already is not fitted again.

        Several processes may fit layers of one run at once. One whose factors are damaged is fitted again.

        Args:
            layers: see :meth:`parse_layers`.
            k: features per layer.
            overwrite: replace factorisations that were made with other options.
            before_layer: called with each layer that is going to be fitted.
            progress: show the solver's bar.
            options: of :func:`snmf_kernels.fit`, JSON values only.

        Yields:
            Each layer with its record (options, iterations, error, seconds, and ``"reused"``), when it is
            saved.

        Raises:
            ValueError: a layer was factorised with other options and ``overwrite`` is not set.
        """
        import snmf_kernels

        from .features import mean_active

        wanted = {"k": k, **options}
        chosen = self.parse_layers(layers)
        todo = [layer for layer in chosen if not self._has(layer, wanted, overwrite)]
        store = self.store() if todo else None
        if todo:
            self._move_records()
            if cautions := self.cautions(k, todo):
                logger.warning("%s", "; ".join(cautions))
        for layer in chosen:
            if layer not in todo or store is None:
                yield layer, self.record(layer) | {"reused": True}
                continue
            if before_layer:
                before_layer(layer)
            started = time.perf_counter()
            factors = snmf_kernels.fit(store.layer(layer).T, k, progress=progress, **options)
            seconds = time.perf_counter() - started
            record = {
                "options": wanted,
                "solver_options": {name: _plain(value) for name, value in factors.options.items()},
                "n_iter": int(factors.n_iter),
                "stop_reason": str(factors.stop_reason.value),
                "relative_error": float(factors.relative_error),
                "dead_features": [int(i) for i in factors.dead_features],
                "mean_active": round(mean_active(factors), 2),
                "backend": str(factors.backend),
                "seconds": round(seconds, 2),
                "versions": versions(),
            }
            yield layer, self._put(layer, factors, record, overwrite)

    def cautions(self, k: int, layers: Sequence[int]) -> list[str]:
        """What speaks against a fit of ``k`` features to these texts, each in a few words; nothing is the best answer.

        Args:
            k: features per layer.
            layers: those that are to be fitted.
        """
        corpus, kept = self.store().corpus, self.config["counts"]["kept"]
        tokens = min(kept[str(layer)] for layer in layers)
        texts = len(corpus.labels) - corpus.n_equal
        labels = Counter(label for label in corpus.labels if label is not None)
        found = []
        if tokens < _TOKENS_PER_FEATURE * k:
            found.append(
                f"{tokens:,} tokens are few for {k} features: with fewer than {_TOKENS_PER_FEATURE} each they fit "
                f"single tokens; take at most {max(tokens // _TOKENS_PER_FEATURE, 1)} features, or more texts"
            )
        if texts < _FEW_TEXTS:
            found.append(
                f"{texts} different texts are few: what they have in common may be chance; take {_FEW_TEXTS} or more"
            )
        if len(labels) == 1:
            found.append(
                f"all labelled texts have the label {next(iter(labels))!r}: no feature gets a concept from it"
            )
        elif len(labels) > 1 and max(labels.values()) == 1:
            found.append("every text has a label of its own: no feature gets a concept from them")
        return found

    def factors(self, layer: int) -> snmf_kernels.Factorization:
        """The factorisation of a layer.

        Raises:
            FileNotFoundError: it has not been made.
        """
        import snmf_kernels

        self._check_fitted(layer)
        return snmf_kernels.Factorization.load(self.factors_path(layer))

    def features(self, layer: int, model: LanguageModel | Callable[[], LanguageModel]) -> list[Feature]:
        """The features of a layer, read from features.jsonl, or described now and written there.

        With the names that ``snmf label`` has given them, and with the effects that have been measured.

        Args:
            layer: a fitted layer.
            model: the model that the run was collected from, or what loads it; called only when it is needed.

        Raises:
            FileNotFoundError: the layer is not factorised.
            ValueError: the model's weights are not those that the run was collected from.
        """
        from .effects import read_words
        from .features import (
            OutdatedFeaturesError,
            describe,
            read_features,
            with_effects,
            with_names,
            write_features,
        )
        from .labels import read_sources

        path = self.features_path(layer)
        features: list[Feature] | None = None
        if self.is_fitted(layer) and path.is_file():
            with contextlib.suppress(OutdatedFeaturesError):
                features = read_features(path)
        if features is None:
            self._check_fitted(layer)
            state = self._state(layer)
            factors, loaded = self.factors(layer), self._checked(model)
            features = describe(factors, self.store(), loaded, layer, corpus=self.words(loaded))
            with files.keeping("features", self.path), files.locked(path.parent):
                # Another command may have factorised the layer anew meanwhile.
                if self._state(layer) == state:
                    write_features(path, features)
        features = with_names(features, read_sources(self.labels_folder(layer)))
        if not self.effects_path(layer).is_file():
            return features
        return with_effects(features, read_words(self.effects_path(layer)))

    def effects(
        self,
        layer: int,
        model: LanguageModel | Callable[[], LanguageModel],
        indices: Sequence[int] | None = None,
        *,
        kl: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Effects:
        """What features of a layer do to the next word, read from effects.safetensors, or measured now and kept there.

        Features that were measured before are not measured again, unless at another divergence. From then on
        :meth:`features` has them.

        Args:
            layer: a fitted layer.
            model: as for :meth:`features`; called only where something is missing.
            indices: which features; by default all.
            kl: the divergence in nats; by default that of what is there, or 0.25.
            progress: see :func:`snmf_interp.effects.measure_effects`.

        Returns:
            All effects of the layer that have been measured at this divergence.

        Raises:
            FileNotFoundError: the layer is not factorised.
            ValueError: the model's weights are not those that the run was collected from, or an argument is out of
                range.
        """
        from .effects import KL, N_RANDOM, PROMPTS, Effects, measure_effects

        path = self.effects_path(layer)
        self._check_fitted(layer)
        state = self._state(layer)
        factors = self.factors(layer)

        def kept() -> tuple[Effects | None, dict[int, WordEffects]]:
            if not path.is_file():
                return None, {}
            there, named = Effects.load(path)
            # Those of a version that measured otherwise cannot stand beside others.
            same = (there.prompts, there.n_random) == (PROMPTS, N_RANDOM) and kl in (None, there.target)
            return (there, named) if same else (None, {})

        there, named = kept()
        wanted = range(factors.k) if indices is None else indices
        done = set() if there is None else {*there.index.tolist(), *map(int, factors.dead_features)}
        missing = [index for index in wanted if index not in done]
        if there is not None and not missing:
            return there
        kl = kl or (KL if there is None else there.target)
        loaded = self._checked(model)
        found = measure_effects(loaded, layer, factors, missing, kl=kl, like=there, progress=progress)
        words = {index: found.words(loaded, index) for index in found.index.tolist()}
        with files.keeping("effects", self.path), files.locked(path.parent):
            # Another command may have measured others meanwhile, or factorised the layer anew.
            if self._state(layer) == state:
                there, named = kept()
                if there is not None:
                    found = there.joined(found)
                record = {"weights": self.config["model"]["weights"], "versions": versions()}
                found.save(path, named | words, record)
        return found

    def words(self, model: LanguageModel | Callable[[], LanguageModel]) -> dict[str, int]:
        """How often each word occurs in the texts, read from words.json, or counted now and written there.

        Args:
            model: the model whose tokenizer made the run's tokens, or what loads it; called only when needed.
        """
        from .models import LanguageModel
        from .words import corpus_words

        path = self.path / WORDS
        if path.is_file():
            there: dict[str, int] = files.read_versioned(path, FORMAT)["counts"]
            return there
        counts = corpus_words(self.store(), model if isinstance(model, LanguageModel) else model())
        ordered = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
        with files.keeping("counts of words", self.path):
            files.write_json(path, {"format": FORMAT, "counts": ordered})
        return ordered

    def hierarchy(
        self,
        layer: int,
        sizes: Sequence[int],
        *,
        keep: float = 0.01,
        neuron_scale: str | None = "rms",
        joint: str | None = "all",
        seed: int = 0,
        overwrite: bool = False,
        **options: Any,
    ) -> tuple[Hierarchy, dict[str, Any]]:
        """The hierarchy of a layer with these options: made, finished, or read if it is there.

        Where the layer has been factorised into ``sizes[0]`` features with the same ``keep`` and ``neuron_scale``,
        that is its finest level.

        Args:
            layer: a collected layer.
            joint: ``"all"``, ``"top"`` or None; see :class:`snmf_interp.JointOptions`.
            sizes, keep, neuron_scale, seed, options: of :func:`snmf_interp.fit_hierarchy`, JSON values only.
            overwrite: replace a hierarchy that was made with other options.

        Returns:
            The hierarchy and its record: ``options``, ``base`` (options of the factorisation that it began with, or
            None), ``seconds`` (None where an earlier call was cut short) and ``reused``. Another process that makes
            this layer's hierarchy is waited for. One that is damaged is made again.

        Raises:
            ValueError: the layer was not collected, or has a hierarchy of other options and ``overwrite`` is not set.
        """
        from .hierarchy import fit_hierarchy
        from .joint import JointOptions

        if layer not in self.layers:
            raise ValueError(
                f"layer: {layer} was not collected; this run has {', '.join(map(str, self.layers))}"
            )
        base, base_record = None, None
        if self.is_fitted(layer):
            solver = self.record(layer)["solver_options"]
            if (solver["k"], solver["keep"], solver["neuron_scale"]) == (sizes[0], keep, neuron_scale):
                base, base_record = self.factors(layer), self._base_record(layer)
        wanted = {
            "levels": list(sizes),
            "keep": keep,
            "neuron_scale": neuron_scale,
            "joint": joint,
            "seed": seed,
        }
        wanted |= {**options, "base": base_record}
        record: dict[str, Any] = {"format": 1, "options": wanted, "versions": versions(), "seconds": None}

        def made(checkpoint: Path | None) -> Hierarchy:
            return fit_hierarchy(
                self.store().layer(layer).T,
                sizes,
                keep=keep,
                neuron_scale=neuron_scale,
                joint=None if joint is None else JointOptions(joint),
                base=base,
                seed=seed,
                checkpoint=checkpoint,
                **options,
            )

        folder = self._tree(layer)
        manifest, result = folder / "manifest.json", folder / "hierarchy.safetensors"
        writable = files.is_writable(folder)
        with self._tree_lock(layer) if writable else contextlib.nullcontext():
            if (kept := self._kept_hierarchy(layer, wanted, overwrite=overwrite)) is not None:
                return kept[0], kept[1] | {"base": base_record, "reused": True}
            started = time.perf_counter()
            if not writable:
                logger.warning("the hierarchy is not kept: %s may not be written to", folder)
                hierarchy = made(None)
                record["seconds"] = round(time.perf_counter() - started, 2)
                return hierarchy, record | {"base": base_record, "reused": False}
            begun = manifest.is_file()
            files.write_json(manifest, record)
            hierarchy = made(folder / "checkpoint")
            if not begun:
                record["seconds"] = round(time.perf_counter() - started, 2)
            hierarchy.save(result)
            files.write_json(manifest, record)
            shutil.rmtree(folder / "checkpoint")
        return hierarchy, record | {"base": base_record, "reused": False}

    def _kept_hierarchy(
        self, layer: int, wanted: dict[str, Any], *, overwrite: bool
    ) -> tuple[Hierarchy, dict[str, Any]] | None:
        """A finished hierarchy with these options and its record, or None; one with others goes with ``overwrite``."""
        from .levels import Hierarchy

        folder = self._tree(layer)
        manifest, result = folder / "manifest.json", folder / "hierarchy.safetensors"
        if manifest.is_file():
            there = files.read_versioned(manifest, 1)
            differing = [
                name
                for name in {**there["options"], **wanted}
                if there["options"].get(name) != wanted.get(name)
            ]
            if differing and not overwrite:
                name = differing[0]
                raise ValueError(
                    f"the tree of layer {layer} of {self.path} was made with {name} = {there['options'].get(name)}, "
                    f"not {wanted.get(name)}; use --overwrite (overwrite=True) to replace it"
                )
            if not differing and result.is_file():
                try:
                    return Hierarchy.load(result), there
                except ValueError as error:
                    logger.warning("the hierarchy of layer %d is made again: %s", layer, error)
            if differing and files.is_writable(folder):
                shutil.rmtree(folder)
        return None

    def descriptions(
        self,
        layer: int,
        model: LanguageModel | Callable[[], LanguageModel],
        hierarchy: Hierarchy | None = None,
    ) -> dict[Place, Description]:
        """What the features of a layer's hierarchy stand for, by ``(level, index)``: read, or found now and written.

        Args:
            layer: a layer whose hierarchy has been made.
            model: as for :meth:`features`.
            hierarchy: what :meth:`hierarchy` gave, where it could not be kept; by default it is read.

        Raises:
            FileNotFoundError: there is no hierarchy.
            ValueError: the model's weights are not those that the run was collected from.
        """
        from .levels import Hierarchy
        from .trees import describe_levels, read_descriptions, write_descriptions

        path = self._tree(layer) / "descriptions.json"
        found = None
        if hierarchy is None and path.is_file():
            found = read_descriptions(path)
        if found is None:
            result = self._tree(layer) / "hierarchy.safetensors"
            state = _state_of(result)
            shown = Hierarchy.load(result) if hierarchy is None else hierarchy
            loaded = self._checked(model)
            found = describe_levels(shown, self.store(), loaded, layer, corpus=self.words(loaded))
            if hierarchy is None:
                with files.keeping("descriptions", self.path), self._tree_lock(layer):
                    # Another command may have replaced the hierarchy meanwhile.
                    if _state_of(result) == state:
                        write_descriptions(path, found)
        return found | self._described_features(layer)

    def _described_features(self, layer: int) -> dict[Place, Description]:
        """What is known of the layer's own features, where they are the finest level: labels and effects among it."""
        from .trees import Description

        manifest = self._tree(layer) / "manifest.json"
        if not manifest.is_file() or not self.features_path(layer).is_file():
            return {}
        base = files.read_versioned(manifest, 1)["options"]["base"]
        if base is None or base != self._base_record(layer):
            return {}
        return {
            (0, feature.index): Description.of(feature) for feature in self.features(layer, self.load_model)
        }

    def tree(self, layer: int) -> Tree | None:
        """The finished hierarchy of a layer, as ``snmf tree`` shows it by default; None where there is none.

        With what its features stand for, where that is known. One that grew out of a factorisation that has been
        replaced since is none of this layer's.
        """
        from .levels import Hierarchy
        from .trees import build_tree, read_descriptions

        folder = self._tree(layer)
        manifest, result = folder / "manifest.json", folder / "hierarchy.safetensors"
        if not (manifest.is_file() and result.is_file()):
            return None
        base = files.read_versioned(manifest, 1)["options"]["base"]
        if base is not None and base != self._base_record(layer):
            return None
        described = folder / "descriptions.json"
        descriptions = read_descriptions(described) if described.is_file() else None
        if descriptions is not None:
            descriptions |= self._described_features(layer)
        return build_tree(Hierarchy.load(result), descriptions=descriptions)

    def token_texts(self, model: LanguageModel | Callable[[], LanguageModel]) -> dict[int, str]:
        """The text of each token that occurs in the texts, but for special ones, by id.

        Read from tokens.json, or found now and written there.

        Args:
            model: the model whose tokenizer made the run's tokens, or what loads it; called only when needed.
        """
        from .models import LanguageModel

        path = self.path / TOKENS
        if path.is_file():
            return {int(i): text for i, text in files.read_versioned(path, FORMAT)["texts"].items()}
        loaded = model if isinstance(model, LanguageModel) else model()
        ids = (i for i in self.store().corpus.ids.unique().tolist() if i not in loaded.special_ids)
        texts = {i: loaded.token_text(i) for i in ids}
        with files.keeping("texts of tokens", self.path):
            # JSON has no integers as names.
            files.write_json(path, {"format": FORMAT, "texts": {str(i): text for i, text in texts.items()}})
        return texts

    def load_model(
        self,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        model: str | Path | None = None,
    ) -> LanguageModel:
        """Load the model that the run was collected from, as it was loaded then.

        Args:
            device: where.
            trust_remote_code: let transformers run code from the Hub repository. A run does not remember that: it
                may come from somebody else.
            model: where the model is now, if it is not where it was: what :func:`snmf_interp.load_model` takes. It must
                have the same weights.

        Raises:
            FileNotFoundError: the model is not where it was.
            ValueError: it cannot be loaded, or its weights are not those that the run was collected from.
        """
        import torch

        from .models import load_model

        record = self.config["model"]
        local = record["kind"] in ("gguf", "folder")
        remedy = "say where it is now: --run-model PATH (model=PATH)"
        if model is None and local and not Path(record["path"]).exists():
            raise FileNotFoundError(f"the model of {self.path} is no longer at {record['path']}; {remedy}")
        if model is None and record["kind"] == "object":
            raise ValueError(
                f"the model of {self.path} ({record['name']!r}) was given in Python, without a place; {remedy}"
            )
        loaded = load_model(
            model or (record["path"] if local else record["name"]),
            device=device,
            dtype=getattr(torch, self.config["collect"]["model_dtype"]),
            revision=record.get("revision") if model is None else None,
            start_token=self.config["collect"]["start_token"],
            trust_remote_code=trust_remote_code,
        )
        if model is not None:
            self.check_model(loaded)
        return loaded

    def mean_active(self, layer: int) -> float:
        """L0: how many features of a fitted layer fire on a token on average."""
        from .features import mean_active

        self._check_fitted(layer)
        kept: float | None = self.record(layer).get("mean_active")
        return mean_active(self.factors(layer)) if kept is None else kept

    def features_path(self, layer: int) -> Path:
        """Where a layer's features are, once described."""
        return self.path / f"layer_{layer}" / "features.jsonl"

    def effects_path(self, layer: int) -> Path:
        """Where the measured effects of a layer's features are, once there are some."""
        return self.path / f"layer_{layer}" / "effects.safetensors"

    def labels_folder(self, layer: int) -> Path:
        """Where a layer's labels are, once made."""
        return self.path / f"layer_{layer}" / "labels"

    def core_folder(self, layer: int) -> Path:
        """Where the tables of ``snmf core`` are, once made."""
        return self.path / f"layer_{layer}" / "core"

    @property
    def answers(self) -> Path:
        """Where the answers of language models are kept."""
        return self.path / "llm"

    def factors_path(self, layer: int) -> Path:
        """Where a layer's factorisation is, once made; what else belongs to the layer lies beside it."""
        return self.path / f"layer_{layer}" / "factors.safetensors"

    def note(self, layer: int, name: str, content: Any) -> None:
        """Add something to the record of a fitted layer; it goes when the layer is fitted again.

        Raises:
            FileNotFoundError: the layer is not factorised.
        """
        self._move_records()
        with files.locked(self.factors_path(layer).parent):
            files.write_json(
                self._record_path(layer), {"format": FORMAT, **self.record(layer), name: content}
            )

    def _put(
        self, layer: int, factors: snmf_kernels.Factorization, record: dict[str, Any], overwrite: bool
    ) -> dict[str, Any]:
        """Keep a fit with its record, unless another command has kept the same meanwhile; the record that counts."""
        with files.locked(self.factors_path(layer).parent):
            if self._has(layer, record["options"], overwrite):
                return self.record(layer) | {"reused": True}
            # Neither the record nor the descriptions and labels of old factors may outlive them.
            self.features_path(layer).unlink(missing_ok=True)
            self.effects_path(layer).unlink(missing_ok=True)
            for made in (self.labels_folder(layer), self.core_folder(layer)):
                if made.is_dir():
                    shutil.rmtree(made)
            self._record_path(layer).unlink(missing_ok=True)
            factors.save(self.factors_path(layer))
            files.write_json(self._record_path(layer), {"format": FORMAT, **record})
        return record | {"reused": False}

    def _record_path(self, layer: int) -> Path:
        return self.path / f"layer_{layer}" / "fit.json"

    @property
    def _older_records(self) -> dict[str, Any]:
        """Records of layers that an older version kept in config.json, for all layers together."""
        records: dict[str, Any] = self.config.get("layers", {})
        return records

    def _move_records(self) -> None:
        """Put records that an older version kept in config.json beside their factors."""
        if "layers" not in self.config:
            return
        with files.locked(self.path):
            config = files.read_versioned(self.path / CONFIG, FORMAT)
            for layer, record in config.pop("layers", {}).items():
                if not (path := self._record_path(int(layer))).is_file():
                    files.write_json(path, {"format": FORMAT, **record})
            files.write_json(self.path / CONFIG, config)
        del self.config["layers"]

    def _state(self, layer: int) -> tuple[int, int] | None:
        """What differs once a layer has been factorised anew."""
        return _state_of(self.factors_path(layer))

    def _check_fitted(self, layer: int) -> None:
        if not self.is_fitted(layer):
            raise FileNotFoundError(
                f"layer {layer} of {self.path} is not factorised yet: "
                f"`snmf fit {shlex.quote(str(self.path))} --layers {layer}`"
            )

    def _base_record(self, layer: int) -> dict[str, Any] | None:
        """What a hierarchy notes of the factorisation that it began with."""
        if not self.is_fitted(layer):
            return None
        fitted = self.record(layer)
        record: dict[str, Any] = fitted["options"] | {"loss": fitted["relative_error"]}
        return record

    def _tree_lock(self, layer: int) -> contextlib.AbstractContextManager[None]:
        # Beside the folder, which goes when the hierarchy is replaced.
        return files.locked(self._tree(layer).parent, ".tree.lock")

    def _tree(self, layer: int) -> Path:
        return self.path / f"layer_{layer}" / "tree"

    def _checked(self, model: LanguageModel | Callable[[], LanguageModel]) -> LanguageModel:
        """The model, loaded if it is not, with the weights that the run was collected from."""
        from .models import LanguageModel

        loaded = model if isinstance(model, LanguageModel) else model()
        self.check_model(loaded)
        return loaded

    def check_model(self, model: LanguageModel) -> None:
        """Raises ValueError unless the model has the weights that the run was collected from."""
        if model.fingerprint() != self.config["model"]["weights"]:
            raise ValueError(
                f"model: the weights of {model.name!r} are not those that {self.path} was collected from"
            )

    def _has(self, layer: int, wanted: dict[str, Any], overwrite: bool) -> bool:
        """Whether ``layer`` is fitted with these options, and its factors are whole."""
        if not self.is_fitted(layer):
            return False
        there = self.record(layer)["options"]
        if there == wanted:
            try:
                self.factors(layer)
            except ValueError as error:
                logger.warning("layer %d is fitted again: %s", layer, error)
                return False
            return True
        if overwrite:
            return False
        name = next(name for name in {**there, **wanted} if there.get(name) != wanted.get(name))
        raise ValueError(
            f"layer {layer} of {self.path} was factorised with {name} = {there.get(name)}, "
            f"not {wanted.get(name)}; use --overwrite (overwrite=True) to replace it, or another folder"
        )


def _state_of(path: Path) -> tuple[int, int] | None:
    """What differs once a file has been replaced; None when it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def versions() -> dict[str, str]:
    """The versions of the packages that shape a run, for the record."""
    # A source checkout on the path has no metadata; better no version than a wrong one.
    return {name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)}


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
