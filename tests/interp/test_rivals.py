"""Other methods beside SNMF, on a model in which the answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import snmf_kernels
from snmf_interp import (
    Judgement,
    LanguageModel,
    Sample,
    hooks,
    rivals,
    split_texts,
    steer,
    steering_protocol,
)
from snmf_interp.detecting import ConceptDetection, Interval, detect_concepts, hard_negatives, summarise
from snmf_interp.dictionaries import (
    NeuronDictionary,
    ProjectionDictionary,
    difference_of_means,
    features,
    random_groups,
)
from snmf_interp.evaluation import best_neurons, halves
from snmf_interp.generation import Continuation
from snmf_interp.immediate import CONTROLS
from snmf_interp.intervals import mean_error
from snmf_interp.rivals import Plan, Trial, bundled_words
from snmf_interp.runs import Run
from snmf_interp.steering_protocol import Protocol, SteeringRecord, record_from_json
from snmf_interp.text_scoring import WordScore, WordScorer, concept_words
from snmf_interp.trial_report import as_json, curves, draw, summarise_immediate, summarise_steering
from snmf_interp.word_meter import matched_words, single_tokens

from .conftest import VOCABULARY
from .planted_model import CONCEPTS, NEURONS, WIDTH, planted_model, planted_samples

PROTOCOL = Protocol(
    targets=(0.2, 0.8),
    choosing=("the cat", "a dog"),
    reporting=("on the mat", "the rug"),
    samples=2,
    report_samples=4,
    max_new_tokens=6,
)
PLAN = Plan(
    k=12, against=("diffmeans", "neuron", "random", "permuted"), fit={"keep": 4 / WIDTH}, protocol=PROTOCOL
)


class Words:
    """Scores by the planted words alone: the model is too simple to have a word order."""

    name = "words"
    identity = "planted words"

    def score(
        self, texts: Sequence[Continuation], concept: str, *, complete: bool = False
    ) -> list[WordScore]:
        return [WordScore(min(len(set(CONCEPTS[concept]) & set(one.text.split())), 2), 2.0) for one in texts]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return planted_model()


@pytest.fixture(scope="module")
def run(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.collect(
        tmp_path_factory.mktemp("planted") / "run", model, planted_samples(), "0", texts="planted"
    )


@pytest.fixture(scope="module")
def trial(run: Run, model: LanguageModel) -> Trial:
    return Trial.open(run, model, PLAN)


@pytest.fixture(scope="module")
def records(trial: Trial) -> list[SteeringRecord]:
    return list(trial.steer(0, [Words()], tuple(CONCEPTS)))


class TestPlanted:
    def test_the_group_is_found(self, trial: Trial) -> None:
        Z = trial.rivals(0)[0].vectors  # type: ignore[attr-defined]
        groups = [set(row.nonzero().squeeze(1).tolist()) for row in Z]
        assert all(set(neurons) in groups for neurons in NEURONS.values())

    def test_detection_finds_it_and_chance_does_not(self, trial: Trial) -> None:
        rows = {row.method: row for row in summarise(trial.detect(0))}
        assert list(rows) == ["snmf", "diffmeans", "neuron", "random", "permuted"]
        assert rows["random"].lead is not None
        assert rows["random"].lead.low > 0
        for name in ("snmf", "diffmeans", "neuron"):
            assert rows[name].auroc.value == pytest.approx(1)
            assert rows[name].hard_auroc.value == pytest.approx(1)
            assert rows[name].detected.value == 1
        assert rows["permuted"].auroc.value < 0.65
        assert rows["permuted"].lead is not None
        assert rows["permuted"].lead.low > 0.1
        assert rows["snmf"].size == 12
        assert rows["diffmeans"].size == 1
        assert rows["neuron"].size == 2 * WIDTH

    def test_what_is_kept_of_it(self, trial: Trial) -> None:
        rows = trial.detect(0)
        kept = json.loads((trial.folder / "layer_0" / "detection.json").read_text())
        assert kept["eps"] == 1e-6
        assert set(kept["methods"]) == {row.method for row in rows}
        for row in rows:
            for i, entry in enumerate(kept["methods"][row.method]):
                assert entry["concept"] == row.detection.names[i]
                assert entry["direction"] == int(row.detection.feature[i])
                assert entry["auroc"] == float(row.detection.auroc[i])
                assert entry["s_cd"] == float(row.s_cd[i])
        versions = json.loads((trial.folder / "plan.json").read_text())["versions"]
        assert versions["torch"] == torch.__version__

    def test_it_is_not_detected_again(self, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is kept is what was found, to the bit."""
        before = trial.detect(0)
        again = Trial(trial.run, trial.model, trial.plan, trial.folder)
        with monkeypatch.context() as patch:
            patch.setattr(rivals, "detect_concepts", lambda *_, **__: pytest.fail("done again"))
            kept = again.detect(0)
        assert [row.method for row in kept] == [row.method for row in before]
        for one, other in zip(kept, before, strict=True):
            assert one.by_concept() == other.by_concept()
            assert one.size == other.size
            assert one.detection.names == other.detection.names
            torch.testing.assert_close(
                one.detection.probe_threshold, other.detection.probe_threshold.double(), rtol=0, atol=0
            )

    def test_steering_finds_it_and_chance_does_not(self, records: list[SteeringRecord]) -> None:
        rows = {row.method: row for row in summarise_steering(records)}
        assert rows["snmf"].n == 3
        assert rows["snmf"].gain.value > 0.5
        assert abs(rows["snmf"].permuted.value) < 0.3
        assert rows["random"].gain.value < rows["snmf"].gain.value - 0.3
        assert rows["random"].lead is not None
        assert rows["random"].lead.value == pytest.approx(rows["snmf"].gain.value - rows["random"].gain.value)

    def test_what_was_chosen(self, records: list[SteeringRecord]) -> None:
        for record in records:
            if record.method == "snmf":
                assert max(record.candidates, key=lambda one: one.effect or -1).index == record.chosen
                assert record.sign == 1
            outcome = record.results["words"]
            best = max(cell.scores["words"] for cell in record.cells)  # type: ignore[type-var]
            chosen = [c for c in record.cells if (c.target, c.sign) == (outcome.target, outcome.sign)]
            assert chosen[0].scores["words"] == best
            # A direction is added as it is.
            assert {cell.sign for cell in record.cells} == {1}
            assert not record.both_signs
            assert len(outcome.texts) == 8
            # What was found on other prompts holds here, roughly.
            assert 0.2 * outcome.target < outcome.kl < 5 * outcome.target

    def test_a_finished_attempt_is_kept(
        self, trial: Trial, records: list[SteeringRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rivals, "steer_concept", lambda *_, **__: pytest.fail("done again"))
        assert list(trial.steer(0, [Words()], tuple(CONCEPTS))) == records

    def test_another_scorer_or_version_makes_it_anew(
        self, trial: Trial, records: list[SteeringRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Others(Words):
            identity = "other words"

        assert records[0].is_by([Words()])
        assert not records[0].is_by([Others()])
        assert not records[0].is_by([Words(), type("Judge", (Words,), {"name": "judge"})()])
        monkeypatch.setattr(steering_protocol, "VERSION", "0")
        assert not records[0].is_by([Words()])

    def test_what_cannot_be_scored_has_no_result(
        self, run: Run, model: LanguageModel, tmp_path: Path
    ) -> None:
        class Silent(Words):
            def score(self, texts: Sequence[Continuation], *_: Any, **__: Any) -> list[Any]:
                return [Judgement(None, None, "no answer", unanswered=True) for _ in texts]

        other = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        silent = Trial.open(other, model, replace(PLAN, against=()))
        (record,) = silent.steer(0, [Silent()], ("days",))
        assert record.results == {}
        assert not record.is_by([Silent()])
        assert all(cell.scores == {"words": None} for cell in record.cells)
        rows = summarise_steering([record])
        assert (rows[0].n, rows[0].dropped, rows[0].missing) == (0, 1, 1.0)

        class Patchy(Words):
            """Has no score of every third text."""

            def score(self, texts: Sequence[Continuation], *args: Any, **options: Any) -> list[Any]:
                known = super().score(texts, *args, **options)
                return [
                    Judgement(None, None, "time-out", unanswered=True) if i % 3 == 0 else one
                    for i, one in enumerate(known)
                ]

        (record,) = silent.steer(0, [Patchy()], ("days",))
        assert record.results["words"].missing == pytest.approx(3 / 8)
        assert all(cell.missing == {"words": 0.5} for cell in record.cells)
        assert not record.is_by([Words()])
        # Also where they are missing on the reporting half alone.
        cells = tuple(replace(cell, unanswered={}) for cell in record.cells)
        assert not replace(record, cells=cells).is_by([Words()])
        # An endpoint that answers again.
        (record,) = silent.steer(0, [Words()], ("days",))
        assert record.results["words"].missing == 0
        assert record.is_by([Words()])

    def test_what_a_judge_cannot_say_is_not_asked_again(
        self, run: Run, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Odd(Words):
            def score(self, texts: Sequence[Continuation], *_: Any, **__: Any) -> list[Any]:
                return [Judgement(None, None, "unusable answer: I refuse") for _ in texts]

        other = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        trial = Trial.open(other, model, replace(PLAN, against=()))
        (record,) = trial.steer(0, [Odd()], ("days",))
        assert record.results == {}
        monkeypatch.setattr(rivals, "steer_concept", lambda *_, **__: pytest.fail("done again"))
        assert list(trial.steer(0, [Odd()], ("days",))) == [record]

    def test_a_method_that_was_fitted_anew_steers_anew(
        self, run: Run, model: LanguageModel, tmp_path: Path
    ) -> None:
        other = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        plan = replace(PLAN, against=())
        (before,) = Trial.open(other, model, plan).steer(0, [Words()], ("days",))
        path = other.path / "eval" / "layer_0" / "snmf.safetensors"
        factors = snmf_kernels.Factorization.load(path)
        replace(factors, Z=factors.Z.flip(0)).save(path)
        (after,) = Trial.open(other, model, plan).steer(0, [Words()], ("days",))
        assert after.made_by["direction"] != before.made_by["direction"]

    def test_records_survive_json(self, records: list[SteeringRecord]) -> None:
        from dataclasses import asdict

        assert [record_from_json(json.loads(json.dumps(asdict(one)))) for one in records] == records

    def test_both_signs(self, trial: Trial, records: list[SteeringRecord]) -> None:
        """The better sign is taken where it may be, by every method but DiffMeans, chance among them."""
        both = {one.method: one for one in trial.steer(0, [Words()], ("days",), both_signs=True)}
        plain = {one.method: one for one in records if one.concept == "days"}
        assert all(record.both_signs for record in both.values())
        for method, record in both.items():
            assert {cell.sign for cell in record.cells} == ({1} if method == "diffmeans" else {1, -1})
        assert both["snmf"].sign == 1
        assert replace(both["diffmeans"], both_signs=False) == plain["diffmeans"]
        meter = trial._meter(0)
        assert meter is not None
        for rival in trial.rivals(0):
            chosen, alone = (
                meter.rises([record.sign * rival.direction(record.chosen)], "days")[0]
                for record in (both[rival.name], plain[rival.name])
            )
            assert chosen >= alone - 1e-9, rival.name

    def test_the_negative_of_a_feature_is_not_that_feature(self, trial: Trial) -> None:
        """It is steered by only where both signs are asked for, even if it alone raises the words."""
        snmf, meter = trial.rivals(0)[0], trial._meter(0)
        ((index, area), *_) = trial._best(
            snmf, snmf.scores(trial.run.store().layer(0), trial.run.store().samples(0), len(trial.labels))
        )["days"]
        negative = ProjectionDictionary("snmf", -snmf.vectors)  # type: ignore[attr-defined]
        for both_signs, sign in ((False, 1), (True, -1)):
            record = steering_protocol.aim(
                trial.model,
                0,
                negative,
                [(index, area)],
                "days",
                PROTOCOL,
                meter=meter,
                both_signs=both_signs,
            )
            assert record.sign == sign

    def test_a_direction_is_chosen_by_what_is_reported(self, trial: Trial) -> None:
        """Of two directions the one with the larger rise above matched words, not the one that flattens."""
        meter = trial._meter(0)
        assert meter is not None
        snmf = trial.rivals(0)[0]
        candidates = [(index, None) for index in range(snmf.size) if bool(snmf.direction(index).any())]
        rises = meter.rises([snmf.direction(index) for index, _ in candidates], "days")
        protocol = replace(PROTOCOL, candidates=len(candidates))
        record = steering_protocol.aim(trial.model, 0, snmf, candidates, "days", protocol, meter=meter)
        assert record.chosen == candidates[max(range(len(rises)), key=rises.__getitem__)][0]
        assert [one.effect for one in record.candidates] == [pytest.approx(rise) for rise in rises]

    def test_the_next_token(self, trial: Trial, records: list[SteeringRecord]) -> None:
        """The concept's words rise under its group, those of the others do not, and chance moves neither as far."""
        rows = {
            (row.method, row.target): row for row in summarise_immediate(records, trial.immediate(records))
        }
        assert {target for _, target in rows} == set(PROTOCOL.targets)
        for target in PROTOCOL.targets:
            ours, chance = rows["snmf", target], rows["random", target]
            assert ours.n == 3
            assert ours.shift.low > 0
            assert ours.log_probability.low > 0
            assert ours.others.value < 0.1 * ours.shift.value
            # The divergence is that of the prompts on which the effect is read, the same for every method.
            for row in (ours, chance, rows["diffmeans", target], rows["neuron", target]):
                assert row.reached < 1 or target <= row.kl <= 1.02 * target
            assert chance.lead is not None
            assert chance.lead.value == pytest.approx(ours.shift.value - chance.shift.value)
            # Three concepts say little of an interval; of which neurons random groups are made is up to chance.
            assert chance.lead.value > 0.25 * ours.shift.value
            assert ours.reached == 1
        assert rows["snmf", 0.8].shift.value > rows["snmf", 0.2].shift.value

    def test_the_next_token_is_that_of_the_reporting_prompts(
        self, trial: Trial, records: list[SteeringRecord]
    ) -> None:
        """Computed anew with whole forward passes."""
        record = next(one for one in records if one.method == "snmf")
        (effects,) = trial.immediate([record])
        effect = effects[-1]
        direction = trial.rivals(0)[0].direction(record.chosen)
        own = [VOCABULARY.index(word) for word in CONCEPTS[record.concept]]
        every = [word for words in CONCEPTS.values() for word in words]
        controls = matched_words(trial.model, every, [*PROTOCOL.choosing, *PROTOCOL.reporting], CONTROLS)
        shifts, rises = [], []
        for prompt in PROTOCOL.reporting:
            ids = torch.tensor([trial.model.encode(prompt)])
            before = hooks.forward(trial.model, ids, torch.ones_like(ids)).logits[0, -1]
            with steer(trial.model, {0: direction}, strength=effect.strength):
                after = hooks.forward(trial.model, ids, torch.ones_like(ids)).logits[0, -1]
            change = after - before
            for word, token in zip(CONCEPTS[record.concept], own, strict=True):
                others = [VOCABULARY.index(other) for other in controls[word]]
                shifts.append(float(change[token] - change[others].mean()))
                rises.append(float((after.log_softmax(0) - before.log_softmax(0))[token]))
        assert (effect.target, effect.sign) == (0.8, 1)
        assert effect.others is not None
        assert effect.shift == pytest.approx(sum(shifts) / len(shifts), rel=1e-3)
        assert effect.log_probability == pytest.approx(sum(rises) / len(rises), rel=1e-3)

    def test_the_next_token_is_read_once(
        self, trial: Trial, records: list[SteeringRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = trial.immediate(records)
        with monkeypatch.context() as patch:
            patch.setattr(trial, "_meter", lambda *_: pytest.fail("read again"))
            assert trial.immediate(records) == found
        # Another sign is another effect.
        (turned, *_) = trial.immediate([replace(records[0], sign=-1), *records[1:]])
        assert turned[0].strength < 0 < found[0][0].strength
        meter, rival = trial._meter(0), trial.rivals(0)[0]
        assert meter is not None
        opposite = meter.measure(records[0], -rival.direction(records[0].chosen))
        assert [effect.shift for effect in turned] == [pytest.approx(effect.shift) for effect in opposite]

    def test_words_of_several_tokens_are_not_read(self, trial: Trial, records: list[SteeringRecord]) -> None:
        words = {"days": ("no-token",), "weather": ("rain", "no-token")}
        some = [one for one in records if one.method == "snmf" and one.concept in words]

        def reading(words: dict[str, tuple[str, ...]]) -> Trial:
            other = Trial(trial.run, trial.model, trial.plan, trial.folder)
            other.__dict__["words"] = words
            return other

        days, weather = reading(words).immediate(some)
        assert (len(days), len(weather)) == (0, len(PROTOCOL.targets))
        assert {effect.others for effect in weather} == {None}
        rows = summarise_immediate(some, [days, weather])
        assert {row.n for row in rows} == {1}
        assert reading({"days": ("no-token",)}).immediate(some) == [(), ()]
        assert summarise_immediate(some, [(), ()]) == []

    def test_the_report(self, trial: Trial, records: list[SteeringRecord], tmp_path: Path) -> None:
        detection = {0: summarise(trial.detect(0))}
        effects = trial.immediate(records)
        content = as_json(detection, records, effects, ["words"], {"model": "planted"})
        json.dumps(content, allow_nan=False)
        assert len(content["pairs"]) == len(records) == 12
        assert content["steering"]["words"]["all"][0]["method"] == "snmf"
        assert len(content["immediate"]["all"]) == 4 * len(PROTOCOL.targets)
        points = curves(records)
        assert set(points["snmf"]) == set(PROTOCOL.targets)
        scores = [
            cell.scores["words"]
            for one in records
            if one.method == "random"
            for cell in one.cells
            if (cell.target, cell.sign) == (0.8, one.results["words"].sign)
        ]
        assert points["random"][0.8] == pytest.approx(sum(map(float, scores)) / 3)  # type: ignore[arg-type]
        draw(tmp_path / "figure.png", detection, records, effects, "words", "a title")
        draw(tmp_path / "detection.png", detection, [], [], "words", "a title")
        assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
        assert not list(tmp_path.glob(".*"))


class TestTrial:
    def test_held_out_texts_are_not_fitted(
        self, run: Run, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Neither by the factorisations nor by the autoencoder, which takes the same tokens and scale."""
        other = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        seen: list[tuple[torch.Tensor, Any]] = []

        def train(A: torch.Tensor, k: int, **options: Any) -> Any:
            seen.append((A, options["neuron_scale"]))
            raise KeyboardInterrupt

        monkeypatch.setattr(rivals, "train_autoencoder", train)
        trial = Trial.open(other, model, replace(PLAN, against=("snmf-raw", "sae")))
        with pytest.raises(KeyboardInterrupt):
            trial.rivals(0)
        store = other.store()
        ours = store.layer(0)[trial.train[store.samples(0)]]
        assert 0 < len(ours) < len(store.layer(0))
        assert torch.equal(seen[0][0], ours.T)
        for name in ("snmf", "snmf-raw"):
            factors = snmf_kernels.Factorization.load(trial.folder / "layer_0" / f"{name}.safetensors")
            assert torch.as_tensor(factors.Y).shape[1] == len(ours)
            assert (factors.neuron_scale is None) == (name == "snmf-raw")
            if name == "snmf":
                assert torch.equal(seen[0][1], torch.as_tensor(factors.neuron_scale))

    def test_another_plan_is_refused(self, trial: Trial, run: Run, model: LanguageModel) -> None:
        with pytest.raises(ValueError, match="k = 12, not 6"):
            Trial.open(run, model, replace(PLAN, k=6))

    def test_detection_does_not_mind_the_protocol(self, trial: Trial, run: Run, model: LanguageModel) -> None:
        other = replace(PLAN, protocol=Protocol())
        with pytest.raises(ValueError, match="with protocol ="):
            Trial.open(run, model, other)
        before = (run.path / "eval" / "plan.json").read_text()
        Trial.open(run, model, other, steering=False).detect(0)
        assert (run.path / "eval" / "plan.json").read_text() == before

    def test_detection_first(self, model: LanguageModel, tmp_path: Path) -> None:
        """It decides nothing about steering, and keeps more candidates than the protocol tries."""
        run = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        Trial.open(run, model, PLAN, steering=False).detect(0)
        matches = json.loads((run.path / "eval" / "layer_0" / "matches.json").read_text())["matches"]
        assert len(matches["neuron"]["days"]) == 20
        assert len(matches["diffmeans"]["days"]) == 1
        other = replace(PLAN, protocol=replace(PROTOCOL, samples=1))
        Trial.open(run, model, other)
        with pytest.raises(ValueError, match="with protocol ="):
            Trial.open(run, model, PLAN)

    def test_dead_features_are_no_candidates(self, trial: Trial) -> None:
        vectors = torch.eye(3, WIDTH)
        vectors[0] = 0
        rival = ProjectionDictionary("dead", vectors)
        scores = torch.ones(3, len(trial.labels))
        assert {index for best in trial._best(rival, scores).values() for index, _ in best} == {1, 2}

    def test_equals_are_taken_in_their_order(self, trial: Trial) -> None:
        scores = torch.ones(4, len(trial.labels))
        found = trial._best(ProjectionDictionary("equal", torch.ones(4, WIDTH)), scores)
        assert found["days"] == [(i, 0.5) for i in range(4)]

    def test_more_rivals_are_not(self, trial: Trial, run: Run, model: LanguageModel) -> None:
        more = Trial.open(run, model, replace(PLAN, against=("random", "snmf-raw")))
        assert [rival.name for rival in more.rivals(0)] == ["snmf", "random", "snmf-raw"]

    def test_repetitions_are_kept_apart(
        self, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each has its own division and fits; the plan's own, by which is steered, stays as it is."""
        run = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        trial = Trial.open(run, model, PLAN)
        trial.detect(0)
        own = {path: path.read_bytes() for path in trial.folder.rglob("*.json")}
        first, second = (trial.repetition(number) for number in (1, 2))
        found = first.detect(0)
        assert trial.repetition(0) is trial
        assert not torch.equal(first.train, trial.train)
        assert not torch.equal(first.train, second.train)
        assert first.plan == replace(PLAN, seed=1)
        assert (trial.folder / "seed-1" / "layer_0" / "snmf.safetensors").is_file()
        assert {path: path.read_bytes() for path in own} == own
        # They are found again; one more is added to them.
        reopened = Trial.open(run, model, PLAN)
        with monkeypatch.context() as patch:
            patch.setattr(snmf_kernels, "fit", lambda *_, **__: pytest.fail("fitted again"))
            patch.setattr(rivals, "detect_concepts", lambda *_, **__: pytest.fail("done again"))
            kept = reopened.repetition(1).detect(0)
        assert [row.by_concept() for row in kept] == [row.by_concept() for row in found]
        reopened.repetition(2).detect(0)
        assert (trial.folder / "seed-2" / "layer_0" / "detection.json").is_file()
        with pytest.raises(ValueError, match="number: wanted at least 0"):
            trial.repetition(-1)

    def test_a_method_that_was_fitted_anew_detects_anew(self, model: LanguageModel, tmp_path: Path) -> None:
        run = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        before = Trial.open(run, model, PLAN).detect(0)
        path = run.path / "eval" / "layer_0" / "snmf.safetensors"
        factors = snmf_kernels.Factorization.load(path)
        replace(factors, Z=factors.Z.flip(0)).save(path)
        after = Trial.open(run, model, PLAN).detect(0)
        same = {
            row.method: row.by_concept() == other.by_concept()
            for row, other in zip(after, before, strict=True)
        }
        assert not same["snmf"]
        assert not same["permuted"]
        assert same["neuron"]
        assert same["diffmeans"]

    @pytest.mark.parametrize("name", ["detection.json", "matches.json"])
    def test_what_is_damaged_is_detected_again(self, model: LanguageModel, tmp_path: Path, name: str) -> None:
        run = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        before = Trial.open(run, model, PLAN).detect(0)
        path = run.path / "eval" / "layer_0" / name
        content = path.read_text()
        path.write_text(content[:-20])
        after = Trial.open(run, model, PLAN).detect(0)
        assert [row.by_concept() for row in after] == [row.by_concept() for row in before]
        assert path.read_text() == content

    def test_overwrite(self, model: LanguageModel, tmp_path: Path) -> None:
        run = Run.collect(tmp_path / "run", model, planted_samples(), "0")
        Trial.open(run, model, PLAN).detect(0)
        Trial.open(run, model, replace(PLAN, k=6), overwrite=True)
        assert not (run.path / "eval" / "layer_0").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": 0}, "k: wanted at least 1"),
            ({"against": ("snmf",)}, "against: wanted some of"),
            ({"against": ("random", "random")}, "each rival once"),
        ],
    )
    def test_bad_plans(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(PLAN, **change)

    def test_another_model(self, run: Run, make_model: Any) -> None:
        with pytest.raises(ValueError, match="are not those that"):
            Trial.open(run, make_model(), PLAN)

    def test_texts_without_labels(self, model: LanguageModel, tmp_path: Path) -> None:
        run = Run.collect(tmp_path / "run", model, [Sample("0", "the cat"), Sample("1", "a dog")], "0")
        with pytest.raises(ValueError, match="at least two labels"):
            Trial.open(run, model, PLAN)

    def test_equal_texts_are_on_one_side(self, model: LanguageModel, tmp_path: Path) -> None:
        """Random labels say nothing: what detects them had seen the held-out texts."""
        samples = planted_samples(18)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        once = [replace(one, label=samples[i].label) for one, i in zip(samples, order, strict=True)]
        twice = [*once, *(replace(one, id=f"{one.id} again", text=one.text + " ") for one in once)]
        run = Run.collect(tmp_path / "run", model, twice, "0")
        plan = replace(PLAN, against=("diffmeans",))
        trial = Trial.open(run, model, plan, steering=False)
        assert torch.equal(trial.train[: len(once)], trial.train[len(once) :])
        # One that was made when equal texts were divided like others.
        path = run.path / "eval" / "plan.json"
        there = json.loads(path.read_text())
        assert there.pop("equal_texts") == len(once)
        path.write_text(json.dumps(there))
        with pytest.raises(ValueError, match=f"equal_texts = 0, not {len(once)}; use --overwrite"):
            Trial.open(run, model, plan, steering=False)

    def test_unknown_concept(self, trial: Trial) -> None:
        with pytest.raises(ValueError, match="'ships' is no label"):
            next(trial.steer(0, [Words()], ("ships",)))

    def test_the_words_come_from_training_texts(self, trial: Trial) -> None:
        assert {name: set(words) for name, words in trial.words.items()} == {
            name: {word.casefold() for word in words} for name, words in CONCEPTS.items()
        }


class TestDictionaries:
    A = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    text_of = torch.arange(50) // 5
    labels = ("x", "y") * 5

    def test_neurons_are_the_best_single_neurons(self) -> None:
        train = split_texts(self.labels)
        scores = NeuronDictionary(12).scores(self.A, self.text_of, 10)
        ours, theirs = (
            halves(scores, self.labels, train),
            best_neurons(self.A, self.text_of, self.labels, train),
        )
        assert torch.equal(ours.feature, theirs.feature)
        assert torch.equal(ours.auroc, theirs.auroc)
        assert NeuronDictionary(12).direction(7).tolist() == [0, 0, 0, -1] + [0] * 8

    def test_difference_of_means(self) -> None:
        train = torch.tensor([True] * 6 + [False] * 4)
        found = difference_of_means(self.A, self.text_of, [*self.labels[:9], None], train)
        assert found.concepts == ("x", "y")
        used = self.A[:30]
        x = (self.text_of[:30] % 2) == 0
        assert torch.allclose(found.direction(0), used[x].mean(0) - used[~x].mean(0), atol=1e-6)
        assert torch.allclose(found.direction(1), -found.direction(0), atol=1e-6)
        scale = torch.rand(12) + 0.5
        scaled = difference_of_means(self.A, self.text_of, [*self.labels[:9], None], train, scale=scale)
        assert torch.equal(scaled.vectors, found.vectors)
        assert scaled.scale is scale
        with pytest.raises(ValueError, match="at least two labels"):
            difference_of_means(self.A, self.text_of, ["x"] * 10, train)

    def test_cosines_in_the_units_of_the_fit(self) -> None:
        scale = torch.rand(12) + 0.5
        vectors = torch.randn(3, 12)
        scores = ProjectionDictionary("p", vectors, scale=scale).scores(self.A, self.text_of, 10)
        cosine = torch.nn.functional.cosine_similarity(
            self.A[None] / scale, (vectors / scale)[:, None], dim=2
        )
        expected = cosine.reshape(3, 10, 5).amax(2)
        assert torch.allclose(scores, expected, atol=1e-5)
        floored = ProjectionDictionary("p", vectors, scale=scale, floor=True).scores(self.A, self.text_of, 10)
        assert torch.allclose(floored, expected.clamp_min(0), atol=1e-5)

    def test_features_and_chance_share_sizes_and_units(self) -> None:
        factors = snmf_kernels.fit(self.A.abs().T, 3, keep=0.25, neuron_scale="rms")
        ours, chance = features(factors), random_groups(factors, seed=1)
        assert torch.equal(ours.direction(1), torch.as_tensor(factors.Z)[:, 1])
        assert torch.equal((chance.vectors != 0).sum(1), (ours.vectors != 0).sum(1))
        assert chance.scale is not None
        assert torch.equal(chance.scale, torch.as_tensor(factors.neuron_scale))
        assert not torch.equal(chance.vectors, random_groups(factors, seed=2).vectors)


class TestDetection:
    def test_hard_negatives_share_the_rarest_words(self) -> None:
        texts = ["the red cat", "a red dog", "red rug", "the blue cat", "green mat", "a rug and the mat"]
        labels = ["a", "a", "b", "b", "c", None]
        train = torch.tensor([True, False, False, False, False, False])
        hard = hard_negatives(texts, labels, train, per_text=1)
        # "cat" is rarer than "red"; a label's own texts and unlabelled ones are none.
        assert {name: row.nonzero().squeeze(1).tolist() for name, row in hard.items()} == {
            "a": [3], "b": [1], "c": [],
        }  # fmt: skip
        with pytest.raises(ValueError, match="per_text"):
            hard_negatives(texts, labels, train, per_text=0)
        with pytest.raises(ValueError, match="texts: wanted one"):
            hard_negatives(texts[:2], labels, train)

    def test_hard_negatives_are_harder(self) -> None:
        labels = ["a", "a", "b", "b", "c", "c"]
        train = torch.tensor([True, False] * 3)

        class Fixed:
            name, size, concepts = "fixed", 2, None

            def scores(self, *_: Any) -> torch.Tensor:
                return torch.tensor([[1.0, 0.5, 0.0, 0.9, 0.0, 0.1], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]])

            def direction(self, index: int) -> torch.Tensor:
                raise NotImplementedError

        hard = {name: torch.zeros(6, dtype=torch.bool) for name in "abc"}
        hard["a"][3] = True
        found = detect_concepts(Fixed(), torch.empty(0), torch.empty(0), labels, train, hard)
        assert found.detection.auroc[0] == 0.5
        assert found.hard_auroc[0] == 0
        assert found.hard_auroc[1:].isnan().all()
        assert float(found.s_cd[0]) == pytest.approx(0, abs=1e-5)

    def test_rows_of_other_concepts(self, trial: Trial) -> None:
        first = trial.detect(0)[0]
        other = replace(first, detection=replace(first.detection, names=("x",)))
        with pytest.raises(ValueError, match="same concepts"):
            summarise([first, other])

    def test_repetitions_are_averaged_concept_by_concept(self, trial: Trial) -> None:
        """Leads are paired; a concept that some repetition lacks is left out of all."""
        rows = trial.detect(0)[:2]

        def scored(names: tuple[str, ...], *areas: list[float]) -> list[ConceptDetection]:
            return [
                replace(
                    row,
                    detection=replace(row.detection, names=names, auroc=torch.tensor(area)),
                    hard_auroc=torch.full((len(names),), math.nan),
                    s_cd=torch.tensor(area) - 0.65,
                )
                for row, area in zip(rows, areas, strict=True)
            ]

        one = scored(("a", "b", "c"), [0.6, 0.7, 0.1], [0.5, 0.5, 0.1])
        two = scored(("b", "a", "x"), [0.9, 0.8, 0.2], [0.8, 0.7, 0.2])
        first, second = summarise(one, two)
        assert first.auroc.value == pytest.approx(0.75)
        assert first.repetitions == (pytest.approx(0.65), pytest.approx(0.85))
        assert first.detected.value == pytest.approx(3 / 4)
        assert list(first.concepts) == ["a", "b"]
        assert first.concepts["b"]["auroc"] == pytest.approx(0.8)
        assert first.concepts["a"]["detected"] == pytest.approx(0.5)
        assert math.isnan(first.concepts["a"]["hard_auroc"])
        assert second.lead is not None
        assert second.lead.value == pytest.approx(0.125)
        assert second.concepts["b"]["lead"] == pytest.approx(0.15)
        with pytest.raises(ValueError, match="same methods"):
            summarise(one, two[:1])
        with pytest.raises(ValueError, match="at least one"):
            summarise()

    def test_intervals_hold_other_repetitions(self) -> None:
        """Where repetitions differ, they hold the true mean as often as they say; those over concepts do not."""
        draw = np.random.default_rng(0).standard_normal
        inside, alone = 0, 0
        for _ in range(400):
            values = torch.from_numpy(0.7 + 0.05 * draw((16, 1)) + 0.06 * draw((1, 5)) + 0.05 * draw((16, 5)))
            both, concepts = Interval.of(values, (0, 1)), Interval.of(values.mean(1), (0, 1))
            assert both.value == pytest.approx(concepts.value)
            inside += both.low <= 0.7 <= both.high
            alone += concepts.low <= 0.7 <= concepts.high
        assert 0.91 < inside / 400 < 0.98
        assert alone / 400 < 0.75

    def test_intervals_of_equal_repetitions(self) -> None:
        """Where they do not differ but by chance, intervals are little wider than those over concepts."""
        draw = np.random.default_rng(0).standard_normal
        inside, widths = 0, []
        for _ in range(400):
            values = torch.from_numpy(0.7 + 0.1 * draw((16, 1)) + 0.05 * draw((16, 5)))
            both, concepts = Interval.of(values, (0, 1)), Interval.of(values.mean(1), (0, 1))
            inside += both.low <= 0.7 <= both.high
            widths.append((both.high - both.low) / (concepts.high - concepts.low))
        assert 0.91 < inside / 400 < 0.98
        assert 1 <= sum(widths) / 400 < 1.1

    def test_the_error_of_a_table(self) -> None:
        """By hand: mean squares 8 of two rows, 12 of three columns and 2 of the rest give (8 + 12 - 2) / 6."""
        rows, columns = torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 0.0, 1.0])
        rest = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
        table = (4 / 3) ** 0.5 * rows + 6**0.5 * columns + rest
        error, freedom = mean_error(table)
        assert error**2 == pytest.approx((8 + 12 - 2) / 6, rel=1e-5)
        assert freedom == pytest.approx(18**2 / (8**2 / 1 + 12**2 / 2 + 2**2 / 2), rel=1e-5)
        assert mean_error(table.T) == (pytest.approx(error), pytest.approx(freedom))
        # Columns that differ less than the rest have no effect of their own.
        error, freedom = mean_error((4 / 3) ** 0.5 * rows + rest)
        assert error**2 == pytest.approx(8 / 6, rel=1e-5)
        assert freedom == 1
        # One column: the standard error of its mean.
        error, freedom = mean_error(torch.tensor([[1.0], [2.0], [6.0]]))
        assert error**2 == pytest.approx(7 / 3)
        assert freedom == 2

    def test_intervals_of_few(self) -> None:
        """They hold the true mean as often as they say."""
        generator = torch.Generator().manual_seed(0)
        inside = 0
        for _ in range(400):
            value = Interval.of(torch.randn(8, generator=generator))
            inside += value.low <= 0 <= value.high
        assert 0.92 < inside / 400 < 0.98
        assert Interval.of(torch.tensor([3.0])).value == 3
        assert math.isnan(Interval.of(torch.tensor([3.0])).low)

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (-4.0, 4.0)])
    def test_intervals_lie_within_the_bounds(self, bounds: tuple[float, float]) -> None:
        low, high = bounds
        for shares in (
            [0.0, 0.66],
            [0.97, 1.0],
            [1.0, 1.0, 0.4],
            [1.0, 1.0],
            [0.0, 0.0, 0.0],
            [0.5] * 19 + [1.0],
        ):
            values = low + (high - low) * torch.tensor(shares)
            for one in (values, torch.stack([values, values.flip(0)], 1)):
                value = Interval.of(one, bounds)
                assert low <= value.low <= value.value <= value.high <= high
            assert (Interval.of(values, bounds).low < value.value) == (len(set(shares)) > 1)

    def test_intervals_of_few_near_a_bound(self) -> None:
        """They hold the true mean more often than those that do not know the bound."""
        values = torch.from_numpy(np.random.default_rng(0).beta(20, 1, (600, 8)))
        inside = [
            sum(one.low <= 20 / 21 <= one.high for one in (Interval.of(row, bounds) for row in values))
            for bounds in ((0, 1), None)
        ]
        assert 0.9 * 600 < inside[0] < 0.97 * 600
        assert inside[0] > inside[1] + 6

    def test_share_intervals(self) -> None:
        value = Interval.of_share(torch.tensor([True, True, True]))
        assert value.value == value.high == 1
        assert 0.3 < value.low < 0.6

    def test_share_intervals_of_repetitions(self) -> None:
        hits = torch.arange(60) < 40
        concepts = Interval.of_share(hits)
        # Repetitions that say the same add nothing.
        same = Interval.of_share(hits[:, None].expand(60, 5))
        assert same.value == concepts.value
        assert same.low == pytest.approx(concepts.low, abs=0.01)
        assert same.high == pytest.approx(concepts.high, abs=0.01)
        # Those that differ in all concepts together leave less to say.
        apart = Interval.of_share(torch.stack([hits, hits, torch.arange(60) < 10], 1))
        assert apart.low < 0.3 < 0.6 < apart.high
        every = Interval.of_share(torch.ones(60, 5, dtype=torch.bool))
        assert every.value == every.high == 1
        assert 0.9 < every.low < 0.96

    def test_bounded_means_have_intervals_within_their_bounds(self, trial: Trial) -> None:
        """With three concepts, near 1."""
        for row in summarise(trial.detect(0)):
            for one in (row.auroc, row.hard_auroc, row.probe_accuracy, row.detected):
                assert math.isnan(one.low) or 0 <= one.low <= one.high <= 1
            assert row.lead is None or -1 <= row.lead.low <= row.lead.high <= 1

    def test_intervals(self) -> None:
        value = Interval.of(torch.tensor([0.0, 1.0] * 50 + [float("nan")]))
        assert value.value == 0.5
        assert 0.35 < value.low < 0.45 < 0.55 < value.high < 0.65
        assert (
            Interval.of(torch.tensor([float("nan")])).value != Interval.of(torch.tensor([float("nan")])).value
        )


class TestWords:
    def test_bundled_words_tell_the_corpus(self) -> None:
        """They were written from the names; here is what they are worth."""
        from snmf_interp import read_texts
        from snmf_interp.words import split_words

        samples, words = read_texts("concepts"), bundled_words()
        assert set(words) <= {sample.label for sample in samples}
        assert len(words) == 59
        hit = [set(map(str.casefold, split_words(sample.text))) for sample in samples]
        own, others = [], []
        for name, listed in words.items():
            assert len(set(listed)) == len(listed)
            for sample, found in zip(samples, hit, strict=True):
                (own if sample.label == name else others).append(bool(found & set(listed)))
        assert sum(own) / len(own) > 0.75
        assert sum(others) / len(others) < 0.02

    def test_words_of_few_texts(self) -> None:
        texts = ["red rain rain", "red rain", "blue sun", "the blue sun"] * 20
        labels = ["x", "x", "y", None] * 20
        train = torch.ones(80, dtype=torch.bool)
        assert concept_words(texts, labels, train) == {"x": ("rain", "red"), "y": ("blue", "sun")}
        assert concept_words(texts, labels, train, count=1)["x"] == ("rain",)

    def test_fluency(self, make_model: Any) -> None:
        from snmf_interp.generation import generate

        model = make_model()
        prompts = ["the cat", "a dog", "on Monday", "the red rug"]
        plain = [one for row in generate(model, prompts, samples=4, max_new_tokens=16) for one in row]
        scorer = WordScorer(model, {"pets": ("cat", "dog"), "none": ()}, plain)

        def fluency(texts: list[str]) -> float:
            made = [Continuation("the cat", text, ()) for text in texts]
            found = [one.fluency for one in scorer.score(made, "pets", complete=True)]
            return sum(value for value in found if value is not None) / len(found)

        fresh = [
            one.text
            for row in generate(model, ["the cat"], samples=12, max_new_tokens=16, seed=5)
            for one in row
        ]
        mixed = [" " + " ".join(sorted(text.split())) for text in fresh]
        assert fluency(fresh) > fluency(mixed) + 0.2
        loop = fresh[0].split()[:4]
        assert fluency([" " + " ".join(loop * 4)]) < 0.7 * fluency([" " + " ".join(loop)])
        assert fluency([""]) == 0

    def test_scores(self, make_model: Any) -> None:
        from snmf_interp.generation import generate

        model = make_model()
        plain = [one for row in generate(model, ["the", "a"], samples=4, max_new_tokens=12) for one in row]
        scorer = WordScorer(model, {"pets": ("cat", "dog"), "none": ()}, plain)
        texts = [Continuation("the", text, ()) for text in (" mat", " Cat cat", " dog and cat")]
        found = scorer.score(texts, "pets")
        assert [one.concept for one in found] == [0, 1, 2]
        assert found[0].fluency is None
        assert found[0].score == 0
        assert WordScore(1, 2).score == pytest.approx(4 / 3)
        assert WordScore(2, 0).score == 0
        with pytest.raises(ValueError, match="no words of 'none'"):
            scorer.score(texts, "none")
        with pytest.raises(ValueError, match="at least two texts"):
            WordScorer(model, {}, plain[:1])


class TestProtocol:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"samples": 0}, "samples: wanted at least 1"),
            ({"reporting": ()}, "reporting: wanted at least one prompt"),
            ({"reporting": ("the cat",)}, "not chosen on"),
        ],
    )
    def test_bad_options(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(PROTOCOL, **change)

    def test_the_halves_share_no_noise(self, model: LanguageModel) -> None:
        same = replace(PROTOCOL, reporting=("the cat .", "a dog ."), report_samples=2)
        streams = [same._streams(prompts) for prompts in (same.choosing, same.reporting)]
        assert streams == [[0, 1], [2, 3]]

    def test_words_of_one_token(self, make_model: Any) -> None:
        """Each token of "Monday" is one word here; unknown ones are none."""
        assert single_tokens(make_model(), ["monday", "cat", "tokyo", "Monday"]) == ("Monday", "cat")

    def test_steered_texts_meet_the_same_noise(self, model: LanguageModel) -> None:
        plain = [one for row in PROTOCOL.texts(model, PROTOCOL.choosing, 2) for one in row]
        for batch_size in (4, 8, 100):
            protocol = replace(PROTOCOL, batch_size=batch_size)
            nothing = protocol.steered(model, 0, torch.ones(WIDTH), [0.0, 1e-6, 0.0], PROTOCOL.choosing, 2)
            assert nothing == [plain] * 3
