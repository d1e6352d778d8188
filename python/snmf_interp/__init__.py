"""Take the MLPs of a language model apart into groups of neurons that people can read.

    from snmf_interp import collect, describe, generate, load_model, read_texts, steer

    model = load_model("smollm2-135m")
    store = collect(model, read_texts("concepts"), layers="12")
    factors = snmf_kernels.fit(store.layer(12).T, k=100)
    features = describe(factors, store, model, layer=12)
    with steer(model, {12: factors.Z[:, 7]}, strength=8.0):
        print(generate(model, "I think that")[0][0].text)

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import collect
    from .autoencoders import load_autoencoder, train_autoencoder
    from .choosing import KChoice, suggest_k
    from .compare import Difference, compare_stores
    from .core import Assignment, NeuronSets, assign_features, neuron_sets
    from .detecting import detect_concepts, hard_negatives
    from .effects import Effects, measure_effects
    from .equal_texts import text_groups
    from .evaluation import (
        Detection,
        best_neurons,
        evaluate_features,
        permuted_labels,
        random_directions,
        split_texts,
    )
    from .features import Feature, describe
    from .generation import Continuation, generate
    from .group_effects import InterventionTable, SetEffect, intervention_table
    from .hierarchy import HierarchyState, fit_hierarchy
    from .immediate import ImmediateEffect, ImmediateMeter
    from .joint import JointOptions
    from .judging import Judgement, Qualification, judge, qualify
    from .labels import Label, label_features
    from .levels import Hierarchy, Level
    from .llm import LocalModel, OpenAIModel
    from .models import LanguageModel, load_model
    from .provenance import (
        NeuronIndex,
        feature_neurons,
        nearest_by_coefficients,
        nearest_by_direction,
        nearest_by_neurons,
        pair_overlap,
    )
    from .report import Report, write_report
    from .rivals import Plan, Trial
    from .sentences import SentenceDetection, detect_sentences, write_sentences
    from .stability import Stability, match_features, stability_of
    from .steering import Intervention, steer
    from .steering_protocol import Protocol, SteeringRecord, steer_concept
    from .store import ActivationStore
    from .strengths import Strength, solve_strength, solve_strengths
    from .supports import Overlap, overlap
    from .text_scoring import JudgeScorer, WordScorer
    from .texts import Sample, read_texts
    from .trees import Description, Tree, build_tree, describe_levels
    from .trial_report import summarise_immediate, summarise_steering
    from .word_groups import group_sentences
    from .word_meter import matched_words

__all__ = [
    "ActivationStore",
    "Assignment",
    "Continuation",
    "Description",
    "Detection",
    "Difference",
    "Effects",
    "Feature",
    "Hierarchy",
    "HierarchyState",
    "ImmediateEffect",
    "ImmediateMeter",
    "Intervention",
    "InterventionTable",
    "JointOptions",
    "JudgeScorer",
    "Judgement",
    "KChoice",
    "Label",
    "LanguageModel",
    "Level",
    "LocalModel",
    "NeuronIndex",
    "NeuronSets",
    "OpenAIModel",
    "Overlap",
    "Plan",
    "Protocol",
    "Qualification",
    "Report",
    "Sample",
    "SentenceDetection",
    "SetEffect",
    "Stability",
    "SteeringRecord",
    "Strength",
    "Tree",
    "Trial",
    "WordScorer",
    "assign_features",
    "best_neurons",
    "build_tree",
    "collect",
    "compare_stores",
    "describe",
    "describe_levels",
    "detect_concepts",
    "detect_sentences",
    "evaluate_features",
    "feature_neurons",
    "fit_hierarchy",
    "generate",
    "group_sentences",
    "hard_negatives",
    "intervention_table",
    "judge",
    "label_features",
    "load_autoencoder",
    "load_model",
    "match_features",
    "matched_words",
    "measure_effects",
    "nearest_by_coefficients",
    "nearest_by_direction",
    "nearest_by_neurons",
    "neuron_sets",
    "overlap",
    "pair_overlap",
    "permuted_labels",
    "qualify",
    "random_directions",
    "read_texts",
    "solve_strength",
    "solve_strengths",
    "split_texts",
    "stability_of",
    "steer",
    "steer_concept",
    "suggest_k",
    "summarise_immediate",
    "summarise_steering",
    "text_groups",
    "train_autoencoder",
    "write_report",
    "write_sentences",
]

_HOMES = {
    "ActivationStore": "store",
    "Assignment": "core",
    "Continuation": "generation",
    "Description": "trees",
    "Detection": "evaluation",
    "Difference": "compare",
    "Effects": "effects",
    "Feature": "features",
    "Hierarchy": "levels",
    "HierarchyState": "hierarchy",
    "ImmediateEffect": "immediate",
    "ImmediateMeter": "immediate",
    "Intervention": "steering",
    "InterventionTable": "group_effects",
    "JointOptions": "joint",
    "JudgeScorer": "text_scoring",
    "Judgement": "judging",
    "KChoice": "choosing",
    "Label": "labels",
    "LanguageModel": "models",
    "Level": "levels",
    "LocalModel": "llm",
    "NeuronIndex": "provenance",
    "NeuronSets": "core",
    "OpenAIModel": "llm",
    "Overlap": "supports",
    "Plan": "rivals",
    "Protocol": "steering_protocol",
    "Qualification": "judging",
    "Report": "report",
    "Sample": "texts",
    "SentenceDetection": "sentences",
    "SetEffect": "group_effects",
    "Stability": "stability",
    "SteeringRecord": "steering_protocol",
    "Strength": "strengths",
    "Tree": "trees",
    "Trial": "rivals",
    "WordScorer": "text_scoring",
    "assign_features": "core",
    "best_neurons": "evaluation",
    "build_tree": "trees",
    "collect": "activations",
    "compare_stores": "compare",
    "describe": "features",
    "describe_levels": "trees",
    "detect_concepts": "detecting",
    "detect_sentences": "sentences",
    "evaluate_features": "evaluation",
    "feature_neurons": "provenance",
    "fit_hierarchy": "hierarchy",
    "generate": "generation",
    "group_sentences": "word_groups",
    "hard_negatives": "detecting",
    "intervention_table": "group_effects",
    "judge": "judging",
    "label_features": "labels",
    "load_autoencoder": "autoencoders",
    "load_model": "models",
    "match_features": "stability",
    "matched_words": "word_meter",
    "measure_effects": "effects",
    "nearest_by_coefficients": "provenance",
    "nearest_by_direction": "provenance",
    "nearest_by_neurons": "provenance",
    "neuron_sets": "core",
    "overlap": "supports",
    "pair_overlap": "provenance",
    "permuted_labels": "evaluation",
    "qualify": "judging",
    "random_directions": "evaluation",
    "read_texts": "texts",
    "solve_strength": "strengths",
    "solve_strengths": "strengths",
    "split_texts": "evaluation",
    "stability_of": "stability",
    "steer": "steering",
    "steer_concept": "steering_protocol",
    "suggest_k": "choosing",
    "summarise_immediate": "trial_report",
    "summarise_steering": "trial_report",
    "text_groups": "equal_texts",
    "train_autoencoder": "autoencoders",
    "write_report": "report",
    "write_sentences": "sentences",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
