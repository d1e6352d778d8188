"""``snmf steer``: unsteered and steered continuations side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import show, terminal
from .arguments import one_layer
from .features import visible
from .generation import Continuation, generate
from .steering import Intervention, steer
from .strengths import PROMPTS, Strength, solve_strengths
from .words import is_function_word, is_letters

if TYPE_CHECKING:
    import snmf_kernels

    from .features import Feature
    from .models import LanguageModel
    from .runs import Run

# The middle of the paper's targets.
_KL = 0.25


@dataclass(frozen=True)
class Request:
    """What is to be steered and how, as the command line has it.

    Raises:
        ValueError: options that contradict each other.
    """

    layer: int
    feature: int | None
    vector: Path | None
    neurons: str | None
    kl: tuple[float, ...]
    strength: tuple[float, ...]
    negative: bool
    both: bool
    ablate: bool
    clamp: float | None

    def __post_init__(self) -> None:
        if self.feature is not None and self.vector is not None:
            raise ValueError("--feature and --vector: give one of them")
        if self.feature is None and self.vector is None and self.neurons is None:
            raise ValueError("give --feature, --vector or --neurons, to say what to steer")
        chosen = [
            name
            for name, given in (
                ("--kl", bool(self.kl)),
                ("--strength", bool(self.strength)),
                ("--ablate", self.ablate),
                ("--clamp", self.clamp is not None),
            )
            if given
        ]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)}: give one of them")
        if self.negative and self.both:
            raise ValueError("--negative and --both: give one of them")
        if (self.negative or self.both) and chosen and chosen[0] in ("--ablate", "--clamp"):
            raise ValueError(f"{chosen[0]} has no sign: leave out --{'both' if self.both else 'negative'}")

    @property
    def signs(self) -> tuple[int, ...]:
        """Of the strengths, in the order in which they are shown."""
        return (1, -1) if self.both else (-1,) if self.negative else (1,)


@dataclass(frozen=True)
class _Setting:
    """One steered column: its intervention and, when a search found the strength, what it found."""

    intervention: Intervention
    solved: Strength | None = None

    def title(self) -> Text:
        value = self.intervention.strength
        if self.intervention.mode != "add":
            return Text("ablated" if value is None else f"clamped to {_number(value)}")
        title = Text(f"strength {_number(value)}")
        if self.solved is not None:
            title.append(f", KL {self.solved.kl:.3g}")
            if not self.solved.reached:
                title.append(f"\n{self.solved.target:g} not reached: at most this", style="yellow")
        return title


def run(
    screen: Console,
    request: Request,
    opened: Run | None,
    load: Callable[[], LanguageModel],
    prompts: Sequence[str],
    *,
    quiet: bool,
    **options: Any,
) -> dict[str, Any]:
    """Find the strengths that were asked for as divergences, generate, and show the texts side by side.

    Args:
        screen: where to.
        request: what to steer.
        opened: the run that the feature is from; None to steer a model by a vector or neurons.
        load: loads the model; called when the rest of the request is known to make sense.
        prompts: texts to continue.
        quiet: show nothing.
        options: of :func:`snmf_interp.generate`.

    Returns:
        All of it as JSON values.

    Raises:
        ValueError: the request does not fit the run or the model.
        FileNotFoundError: the factorisation, or the file of the vector, is not there.
    """
    factors = _factors(request, opened)
    vector = _vector(request, factors)
    model = load()
    width = model.d_mlp(request.layer)
    neurons = None if request.neurons is None else _numbers(request.neurons, width)
    feature = None
    if opened is not None and request.feature is not None:
        feature = opened.features(request.layer, model)[request.feature]
    if not quiet:
        _head(screen, request, model, feature, options)
    with terminal.waiting("generating without steering"):
        plain = generate(model, prompts, **options)
    groups = []
    for group in _groups(request, model, vector, neurons, factors):
        steered = []
        for setting in group:
            with (
                terminal.waiting(f"generating at {setting.title().plain.splitlines()[0]}"),
                steer(model, {request.layer: setting.intervention}),
            ):
                steered.append(generate(model, prompts, **options))
        groups.append((group, steered))
        if not quiet:
            _show(screen, feature, plain, group, steered)
    return {
        "model": model.name,
        "site": model.hook_name(request.layer),
        "layer": request.layer,
        "feature": request.feature,
        "vector": None if request.vector is None else str(request.vector),
        "neurons": neurons,
        "name": None if feature is None else feature.name,
        "concept": None if feature is None else feature.concept,
        "words": None if feature is None else [word for word, _ in feature.words],
        "raised": None
        if feature is None or feature.effects is None
        else [w for w, _ in feature.effects.raised],
        "generate": options,
        "kl_prompts": list(PROMPTS) if _targets(request) else None,
        "unsteered": _records(plain),
        "steered": [
            {
                "mode": setting.intervention.mode,
                "strength": setting.intervention.strength,
                "solved": None if setting.solved is None else asdict(setting.solved),
                "continuations": _records(texts),
            }
            for group, steered in groups
            for setting, texts in zip(group, steered, strict=True)
        ],
    }


def layer_of(target: str, opened: Run | None, layers: str | None) -> int:
    """The layer to steer: of a run its only one where ``layers`` says nothing.

    Raises:
        ValueError: ``layers`` names none or several.
    """
    # Neurons may be steered in layers that were not collected.
    if layers is not None and layers.isdigit():
        return int(layers)
    if opened is not None:
        return one_layer(opened, layers)
    got = "none" if layers is None else repr(layers)
    raise ValueError(f"--layers: wanted the number of one layer of {target}, got {got}")


def _factors(request: Request, opened: Run | None) -> snmf_kernels.Factorization | None:
    """Those of the feature; None where none is steered."""
    if request.feature is None:
        return None
    if opened is None:
        raise ValueError("--feature: features are those of a run; give its folder, made by `snmf collect`")
    factors = opened.factors(request.layer)
    if not 0 <= request.feature < factors.k:
        raise ValueError(
            f"--feature: layer {request.layer} has features 0-{factors.k - 1}, got {request.feature}"
        )
    return factors


def _vector(request: Request, factors: snmf_kernels.Factorization | None) -> Any:
    """The direction ``[d_mlp]``, or None when neurons alone are steered."""
    if request.vector is not None:
        try:
            return np.load(request.vector, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"--vector: {request.vector} is not a .npy file of numbers; write it with numpy.save"
            ) from error
    return None if factors is None else factors.Z[:, request.feature]


def _numbers(ranges: str, width: int) -> list[int]:
    """Neurons from ``"3,17-20"``."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in ranges.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or not int(match[1]) <= int(match[2] or match[1]) < width:
            raise ValueError(f"--neurons: wanted numbers and ranges among 0-{width - 1}, got {part!r}")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not found:
        raise ValueError(f"--neurons: {ranges!r} names no neuron")
    return sorted(found)


def _targets(request: Request) -> tuple[float, ...]:
    """Divergences to reach; none when the strength is given, or there is none."""
    given = request.strength or request.ablate or request.clamp is not None
    return () if given else request.kl or (_KL,)


def _groups(
    request: Request,
    model: LanguageModel,
    vector: Any,
    neurons: list[int] | None,
    factors: snmf_kernels.Factorization | None,
) -> Iterator[list[_Setting]]:
    """Settings to be shown beside each other: the signs of one target or strength."""
    if request.ablate or request.clamp is not None:
        mode: Any = "ablate" if request.ablate else "clamp"
        if factors is not None and request.feature is not None:
            options: Any = {"mode": mode, "strength": request.clamp, "neurons": neurons}
            yield [_Setting(Intervention.feature(factors, request.feature, **options))]
        else:
            yield [_Setting(Intervention(vector, mode, request.clamp, neurons))]
        return
    if vector is None:
        vector = torch.ones(model.d_mlp(request.layer))
    for strength in request.strength:
        yield [_Setting(Intervention(vector, "add", sign * strength, neurons)) for sign in request.signs]
    if targets := _targets(request):
        with terminal.waiting("finding the strengths"):
            found = solve_strengths(
                model, request.layer, vector, targets, signs=request.signs, neurons=neurons
            )
        for target in targets:
            yield [
                _Setting(Intervention(vector, "add", solved.strength, neurons), solved)
                for solved in found
                if solved.target == target
            ]


def _head(
    screen: Console, request: Request, model: LanguageModel, feature: Feature | None, options: dict[str, Any]
) -> None:
    """What is steered, and how."""
    if feature is not None:
        screen.print(show.feature_head(feature))
    else:
        what = f"neurons {request.neurons}" if request.vector is None else f"the vector {request.vector}"
        screen.print(Text.assemble((f"layer {request.layer}, {what}", "bold")))
    if request.neurons is not None and (feature is not None or request.vector is not None):
        screen.print(Text(f"only its neurons among {request.neurons}", style="dim"))
    samples = options["samples"]
    line = (
        f"{model.name}; {samples} sample{'s'[: samples != 1]} of at most {options['max_new_tokens']} tokens, "
        f"temperature {options['temperature']:g}, top-p {options['top_p']:g}, seed {options['seed']}"
    )
    if _targets(request):
        line += (
            "\nKL(unsteered ‖ steered) of the next token in nats, mean over "
            f"{len(PROMPTS)} neutral prompts such as {PROMPTS[0]!r}"
        )
    if _own_words(feature) is not None:
        mark = "in colour" if screen.is_terminal else "in ‹ ›"
        line += f"\n{mark}: words that the feature fires on, or raises where that was measured"
    screen.print(Text(line, style="dim"))


def _show(
    screen: Console,
    feature: Feature | None,
    plain: Sequence[Sequence[Continuation]],
    group: Sequence[_Setting],
    steered: Sequence[Sequence[Sequence[Continuation]]],
) -> None:
    """A table for each prompt."""
    own = _own_words(feature)
    for number, row in enumerate(plain):
        columns = [row, *(texts[number] for texts in steered)]
        # Rich divides what is left over among columns by their content; these are to be of one width.
        room = (screen.width - 2 * (len(columns) - 1)) // len(columns)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        for title in (Text("unsteered"), *(setting.title() for setting in group)):
            table.add_column(title, width=room, vertical="top")
        for texts in zip(*columns, strict=True):
            table.add_row(*(Group(_text(one, own, marks=not screen.is_terminal), Text()) for one in texts))
        screen.print(Text.assemble("\n", (visible(row[0].prompt), "bold"), " …\n"))
        screen.print(table)


def _own_words(feature: Feature | None) -> Any:
    """A pattern of what the feature fires on and, measured, makes likelier, or None.

    Function words and short ones are left out, for they are in every text.
    """
    if feature is None:
        return None
    raised = feature.effects.raised if feature.effects is not None else ()
    words = {word.strip() for word, _ in (*feature.words, *raised)}
    own = (
        word for word in sorted(words) if len(word) > 3 and is_letters(word) and not is_function_word(word)
    )
    chosen = "|".join(map(re.escape, own))
    return regex.compile(rf"\b(?:{chosen})\b", regex.IGNORECASE) if chosen else None


def _text(continuation: Continuation, own: Any, *, marks: bool) -> Text:
    """A continuation with the feature's own words in colour, or in ‹ ›. It is text of a model: never markup."""
    plain = visible(continuation.text.strip(" ")) or "(it ends the text here)"
    if own is None:
        return Text(plain)
    if marks:
        return Text(own.sub(lambda match: f"‹{match[0]}›", plain))
    text = Text(plain)
    text.highlight_regex(own, "bold yellow")
    return text


def _number(value: float) -> str:
    """Signed, with three figures, or whole from 100 on."""
    return (f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3g}").replace("-", "−")


def _records(texts: Sequence[Sequence[Continuation]]) -> list[dict[str, Any]]:
    return [asdict(one) for row in texts for one in row]
