"""Fits of a run's layer beside the one that is shown: other starts, and other numbers of features. Both resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import snmf_kernels

from . import files
from .choosing import KChoice, KEvidence, candidates, suggest_k
from .stability import THRESHOLD, Stability, check_seeds, stability_of

if TYPE_CHECKING:
    from .runs import Run

logger = logging.getLogger(__name__)

_FORMAT = 2
# Under the name of what was chosen, in the record of a layer.
K_CHOICE = "k_choice"
# Fits under way at once on a GPU, see snmf_kernels.fit_many; elsewhere each is saved before the next begins.
_AT_ONCE = 8


def other_starts(
    run: Run, layer: int, count: int, *, before: Callable[[int], None] | None = None, progress: bool = False
) -> list[snmf_kernels.Factorization]:
    """The factorisation of a layer, and ``count - 1`` more that differ from it in the seed alone.

    They are kept in ``layer_N/starts``; what is there is not fitted again.

    Args:
        run: a run.
        layer: a fitted layer.
        count: how many in all, at least 2.
        before: called with each seed that is going to be fitted.
        progress: show a bar over the fits.

    Raises:
        FileNotFoundError: the layer is not factorised.
        ValueError: ``count`` is less than 2.
    """
    check_seeds(count, 2)
    first = run.factors(layer)
    options = dict(run.record(layer)["options"])
    k, own = options.pop("k"), options.pop("seed", 0)
    folder = run.factors_path(layer).parent / "starts"
    seeds = [seed for seed in range(count) if seed != own][: count - 1]
    found = {seed: _saved(folder / f"seed_{seed}.safetensors", first, seed) for seed in seeds}
    missing = [seed for seed, fit in found.items() if fit is None]
    at_once = _AT_ONCE if str(options.get("device", "cpu")).startswith("cuda") else 1
    if missing:
        A = run.store().layer(layer).T
        for start in range(0, len(missing), at_once):
            group = missing[start : start + at_once]
            for seed in group:
                if before:
                    before(seed)
            fits = snmf_kernels.fit_many(A, k, seed=group, progress=progress, **options)
            for seed, fit in zip(group, fits, strict=True):
                with files.keeping("fits from other starts", run.path):
                    fit.save(folder / f"seed_{seed}.safetensors")
                found[seed] = fit
    return [first, *(fit for fit in found.values() if fit is not None)]


def layer_stability(
    run: Run,
    layer: int,
    count: int,
    *,
    threshold: float = THRESHOLD,
    before: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Stability:
    """:func:`snmf_interp.stability.stability_of` the fits of :func:`other_starts`."""
    return stability_of(
        other_starts(run, layer, count, before=before, progress=progress), threshold=threshold
    )


def choose_k(
    run: Run,
    layer: int,
    ks: Sequence[int] | None,
    options: dict[str, Any],
    *,
    before: Callable[[int], None] | None = None,
    progress: bool = False,
) -> KChoice:
    """:func:`snmf_interp.choosing.suggest_k` for a layer of a run, whole texts held out, equal ones together.

    The evidence for each k is kept in ``layer_N/k_evidence.json`` when it is there, so that a choice that was cut
    short goes on, and one with more candidates fits only those.

    Args:
        run: a run.
        layer: a collected layer.
        ks: candidates; by default :func:`snmf_interp.choosing.candidates`.
        options: of :func:`snmf_kernels.fit`, JSON values only; ``seed`` is the first of five.
        before: called with each k that is going to be fitted.
        progress: show a bar over the fits of each k.
    """
    rest = dict(options)
    first = rest.pop("seed", 0)
    store = run.store()
    activations = store.layer(layer)
    wanted = sorted(set(ks)) if ks else candidates(activations.shape[1], len(activations))
    seeds = list(range(first, first + 5))
    path = run.factors_path(layer).parent / "k_evidence.json"
    asked = {"format": _FORMAT, "options": rest, "seeds": seeds}
    rows = _evidence(path, asked)

    def keep(row: KEvidence) -> None:
        with files.locked(path.parent):
            # Another command may have added to it meanwhile.
            found = _evidence(path, asked) | {row.k: row}
            files.write_json(path, asked | {"evidence": [asdict(found[k]) for k in sorted(found)]})

    return suggest_k(
        activations.T,
        wanted,
        groups=store.corpus.groups[store.samples(layer)],
        seeds=seeds,
        known=list(rows.values()),
        after=keep,
        before=before,
        progress=progress,
        **rest,
    )


def _saved(path: Path, like: snmf_kernels.Factorization, seed: int) -> snmf_kernels.Factorization | None:
    """A fit of an earlier call, or None where there is none with these options."""
    if not path.is_file():
        return None
    try:
        there = snmf_kernels.Factorization.load(path)
    except ValueError as error:
        logger.warning("seed %d is fitted again: %s", seed, error)
        return None
    return there if _plain(there.options) == _plain({**like.options, "seed": seed}) else None


def _plain(options: Any) -> Any:
    # As they are after a way through JSON: numbers of the data, such as a penalty's threshold, are equal then too.
    return json.loads(json.dumps(dict(options), sort_keys=True))


def _evidence(path: Path, asked: dict[str, Any]) -> dict[int, KEvidence]:
    """The rows of an earlier call that asked for the same."""
    if not path.is_file():
        return {}
    there = files.read_json(path)
    if {name: there.get(name) for name in asked} != asked:
        return {}
    return {row["k"]: KEvidence(**row) for row in there["evidence"]}
