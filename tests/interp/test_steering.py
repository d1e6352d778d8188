from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import snmf_kernels
from snmf_interp import Intervention, LanguageModel, hooks, solve_strength, steer

from .conftest import FAMILIES, make_network, make_tokenizer

Maker = Callable[..., LanguageModel]
IDS = torch.tensor([[1, 4, 6, 8, 10], [1, 5, 7, 9, 11]])
WIDTH = 24


def vector(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * 3


def logits(model: LanguageModel, ids: Tensor = IDS) -> Tensor:
    return hooks.forward(model, ids, torch.ones_like(ids)).logits


def activations(model: LanguageModel, layer: int, ids: Tensor = IDS) -> Tensor:
    """The steered activations ``[b * t, d_mlp]``: a capture inside the block watches behind the steering."""
    with hooks.capture(model, [layer]) as captured:
        logits(model, ids)
    return captured[layer].reshape(-1, WIDTH)


def n_hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


def with_bias(model: LanguageModel, layer: int, added: Tensor) -> LanguageModel:
    """A copy of the model whose down projection has ``added [d_model]`` in its bias: steering without hooks."""
    patched = copy.deepcopy(model)
    module: Any = patched.down_projection(layer)
    bias = torch.zeros_like(added) if module.bias is None else module.bias.detach()
    module.bias = torch.nn.Parameter(bias + added, requires_grad=False)
    return patched


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_model: Maker) -> LanguageModel:
    return make_model(request.param)


class TestAdd:
    def test_is_a_bias(self, model: LanguageModel) -> None:
        z = vector()
        for alpha in (2.5, -2.5):
            patched = with_bias(model, 1, model.down_weight(1) @ (alpha * z / z.norm()))
            with steer(model, {1: z}, strength=alpha):
                got = logits(model)
            torch.testing.assert_close(got, logits(patched), rtol=1e-4, atol=1e-4)
            assert (got - logits(model)).abs().max() > 1e-2

    def test_several_layers_and_directions(self, model: LanguageModel) -> None:
        a, b, c = vector(1), vector(2), vector(3)
        patched = with_bias(model, 0, model.down_weight(0) @ (a / a.norm() - 2 * b / b.norm()))
        patched = with_bias(patched, 2, model.down_weight(2) @ (3 * c / c.norm()))
        with steer(model, {0: [a, Intervention(b, "add", -2.0)], model.hook_name(2): Intervention(c, "add", 3.0)},
                   strength=1.0):  # fmt: skip
            got = logits(model)
        torch.testing.assert_close(got, logits(patched), rtol=1e-4, atol=1e-4)

    def test_a_strength_for_each_row(self, model: LanguageModel) -> None:
        strengths = [0.0, 4.0, -4.0]
        ids = IDS[:1].expand(3, -1)
        with steer(model, {1: vector()}, strength=strengths):
            together = logits(model, ids)
        for row, strength in zip(together, strengths, strict=True):
            with steer(model, {1: vector()}, strength=strength):
                torch.testing.assert_close(row[None], logits(model, ids[:1]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[0], logits(model)[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
    def test_a_vector_for_each_row(self, mode: Any, model: LanguageModel) -> None:
        """The batch gives what each row gives alone, where the projection's input is flattened too (OPT)."""
        vectors = torch.stack([vector(1), 5 * vector(2), vector(3)])
        strengths = None if mode == "ablate" else torch.tensor([3.0, -2.0, 1.0])
        ids = torch.stack([IDS[0], IDS[1], IDS[0]])
        with steer(model, {1: Intervention(vectors, mode, strengths, neurons=range(3, 20))}):
            together = logits(model, ids)
        for row in range(3):
            strength = None if strengths is None else float(strengths[row])
            with steer(model, {1: Intervention(vectors[row], mode, strength, neurons=range(3, 20))}):
                alone = logits(model, ids[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        assert (together[0] - together[2]).abs().max() > 1e-2

    def test_neurons(self, make_model: Maker) -> None:
        model = make_model()
        before = activations(model, 1)
        with steer(model, {1: Intervention(neurons=[3, 20], strength=2.0)}):
            change = activations(model, 1) - before
        expected = torch.zeros(WIDTH)
        expected[[3, 20]] = 2.0
        torch.testing.assert_close(change, expected.expand_as(change))

    def test_restriction_is_scaled_to_unit_length(self, make_model: Maker) -> None:
        model = make_model()
        before = activations(model, 1)
        with steer(model, {1: Intervention(vector(), strength=2.0, neurons=range(5))}):
            change = activations(model, 1) - before
        assert not change[:, 5:].any()
        torch.testing.assert_close(change[:, :5], (2 * vector()[:5] / vector()[:5].norm()).expand(10, 5))


class TestAblateAndClamp:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_coefficient(self, family: str, make_model: Maker) -> None:
        model = make_model(family)
        unit = vector() / vector().norm()
        before = activations(model, 1)
        assert (before @ unit).abs().max() > 0.1
        for intervention, wanted in (
            (Intervention(vector(), "ablate"), torch.zeros(10)),
            (Intervention(vector(), "clamp", -3.0), torch.full((10,), -3.0)),
            (Intervention(vector(), "clamp", [1.0, 2.0]), torch.tensor([1.0, 2.0]).repeat_interleave(5)),
        ):
            with steer(model, {1: intervention}):
                after = activations(model, 1)
            torch.testing.assert_close(after @ unit, wanted, rtol=1e-4, atol=1e-4)
            # Nothing across the direction has changed.
            torch.testing.assert_close(
                after - (after @ unit)[:, None] * unit, before - (before @ unit)[:, None] * unit
            )

    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_neurons(self, family: str, make_model: Maker) -> None:
        model = make_model(family)
        before = activations(model, 1)
        for intervention, wanted in (
            (Intervention(mode="ablate", neurons=torch.tensor([20, 3, 3])), torch.zeros(10, 2)),
            (Intervention(mode="clamp", strength=1.5, neurons=[3, 20]), torch.full((10, 2), 1.5)),
            (
                Intervention(mode="clamp", strength=[1.0, -1.0], neurons=[3, 20]),
                torch.tensor([1.0, -1.0]).repeat_interleave(5)[:, None].expand(10, 2),
            ),
        ):
            with steer(model, {1: intervention}):
                after = activations(model, 1)
            assert torch.equal(after[:, [3, 20]], wanted)
            others = [i for i in range(WIDTH) if i not in (3, 20)]
            assert torch.equal(after[:, others], before[:, others])

    def test_ablation_is_a_changed_weight(self, model: LanguageModel) -> None:
        """Projecting the input is projecting the weight: no hook is needed to say what must come out."""
        unit = vector() / vector().norm()
        patched = copy.deepcopy(model)
        weight = patched.down_weight(1)
        with torch.no_grad():
            weight -= (weight @ unit)[:, None] * unit
        with steer(model, {1: Intervention(vector(), "ablate")}):
            torch.testing.assert_close(logits(model), logits(patched), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_a_feature_is_its_coefficient(self, family: str, make_model: Maker) -> None:
        """Not the projection on its direction: features overlap."""
        model = make_model(family)
        before = activations(model, 1)
        data = torch.cat([before.T, torch.rand(WIDTH, 60, generator=torch.Generator().manual_seed(1))], 1)
        factors = snmf_kernels.fit(data, 5, keep=0.6)
        Z, Y = torch.as_tensor(factors.Z), torch.as_tensor(factors.encode(before.T).Y)
        index = int(Y.sum(1).argmax())
        z, y = Z[:, index], Y[index]
        assert float(y.max()) > 0
        for mode, strength, wanted in (
            ("ablate", None, torch.zeros(10)),
            ("clamp", 3.0, torch.full((10,), 3.0)),
            ("clamp", [1.0, 2.0], torch.tensor([1.0, 2.0]).repeat_interleave(5)),
        ):
            options: Any = {"mode": mode, "strength": strength}
            with steer(model, {1: Intervention.feature(factors, index, **options)}):
                after = activations(model, 1)
            expected = before + (wanted / z.norm() - y)[:, None] * z
            torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
            # Encoded again it has the strength that was asked for, where it fired before.
            again, fired = torch.as_tensor(factors.encode(after.T, tol=1e-6).Y), y > 1e-3
            torch.testing.assert_close((again[index] * z.norm())[fired], wanted[fired], rtol=0.02, atol=0.02)
        projected = Intervention(z, "clamp", 3.0)
        with steer(model, {1: projected}):
            other = activations(model, 1)
        assert (other - expected).abs().max() > 1e-2
        # On some neurons alone the change is made there.
        part = Intervention.feature(factors, index, mode="ablate", neurons=range(5))
        with steer(model, {1: part}):
            change = activations(model, 1) - before
        assert not change[:, 5:].any()
        torch.testing.assert_close(change[:, :5], -y[:, None] * z[:5], rtol=1e-3, atol=1e-3)

    def test_in_order(self, make_model: Maker) -> None:
        model = make_model()
        unit = vector() / vector().norm()
        add, ablate = Intervention(vector(), strength=5.0), Intervention(vector(), "ablate")
        for order, wanted in (([add, ablate], 0.0), ([ablate, add], 5.0)):
            with steer(model, {1: order}):
                found = activations(model, 1) @ unit
            torch.testing.assert_close(found, torch.full((10,), wanted), rtol=1e-4, atol=1e-4)


class TestDecoding:
    @pytest.mark.parametrize(
        "intervention",
        [Intervention(vector(), strength=6.0), Intervention(vector(), "clamp", 4.0),
         Intervention(vector(), strength=[6.0, -6.0])],
        ids=["add", "clamp", "rows"],
    )  # fmt: skip
    def test_cache_agrees_with_recomputation(self, model: LanguageModel, intervention: Intervention) -> None:
        """Every later step sees one token only, and must be steered all the same."""
        options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        options |= {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
        plain = model.model.generate(IDS, **options)
        with steer(model, {1: intervention}):
            cached = model.model.generate(IDS, **options, use_cache=True)
            whole = model.model.generate(IDS, **options, use_cache=False)
            steps = hooks.forward(model, cached, torch.ones_like(cached)).logits.clone()
        assert torch.equal(cached, whole)
        assert not torch.equal(cached, plain)
        # Each token is the likeliest one (end of text aside, which min_new_tokens rules out) of one pass over all.
        steps[..., 2] = -torch.inf
        assert torch.equal(steps[:, 4:-1].argmax(-1), cached[:, 5:])

    def test_left_padding(self, model: LanguageModel) -> None:
        sequences = [[1, 4, 6, 8, 10], [1, 5]]
        ids, mask = hooks.pad(sequences, side="left", pad_id=0)
        with steer(model, {1: vector()}, strength=[3.0, -5.0]):
            padded = hooks.forward(model, ids, mask).logits[:, -1]
        for row, sequence, strength in zip(padded, sequences, (3.0, -5.0), strict=True):
            with steer(model, {1: vector()}, strength=strength):
                alone = logits(model, torch.tensor([sequence]))[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-3)


class TestRestored:
    def test_to_the_bit(self, model: LanguageModel) -> None:
        before = logits(model)
        with steer(model, {0: vector(), 1: Intervention(vector(), "ablate")}, strength=[3.0, 4.0]):
            assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
        assert n_hooks(model) == 0

    def test_after_an_exception(self, make_model: Maker) -> None:
        model = make_model()
        before = logits(model)
        with pytest.raises(RuntimeError, match="mine"), steer(model, {1: vector()}, strength=3.0):
            raise RuntimeError("mine")
        with pytest.raises(IndexError), steer(model, {1: vector()}, strength=3.0):
            logits(model, IDS + 1000)
        with pytest.raises(ValueError, match="rows"), steer(model, {1: vector()}, strength=[1.0] * 3):
            logits(model)
        assert n_hooks(model) == 0
        assert torch.equal(logits(model), before)

    def test_after_a_refusal(self, make_model: Maker) -> None:
        model = make_model()
        with (
            pytest.raises(ValueError, match="wanted 24"),
            steer(model, {0: vector(), 1: torch.ones(5)}, strength=1.0),
        ):
            pass
        assert n_hooks(model) == 0

    def test_nested(self, make_model: Maker) -> None:
        model = make_model()
        unit = vector() / vector().norm()
        before = logits(model)
        with steer(model, {1: Intervention(vector(), "clamp", 2.0)}):
            outer = logits(model)
            with steer(model, {1: vector()}, strength=3.0):
                # The inner one adds to what the outer one has set, not the other way round.
                torch.testing.assert_close(activations(model, 1) @ unit, torch.full((10,), 5.0))
            assert torch.equal(logits(model), outer)
            with pytest.raises(RuntimeError), steer(model, {1: vector()}, strength=3.0):
                raise RuntimeError
            assert torch.equal(logits(model), outer)
        assert torch.equal(logits(model), before)

    def test_what_was_captured_before_is_not_overwritten(self, make_model: Maker) -> None:
        model = make_model()
        before = activations(model, 1)
        with hooks.capture(model, [1]) as captured, steer(model, {1: vector()}, strength=3.0):
            logits(model)
        assert torch.equal(captured[1].reshape(-1, WIDTH), before)


class TestDtypeAndPlace:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype, make_model: Maker) -> None:
        model = make_model()
        model.model.to(dtype)
        unit = vector() / vector().norm()
        for intervention in (Intervention(vector(), "clamp", 3.0), Intervention(vector(), "add", 3.0)):
            before = activations(model, 1).float()
            with steer(model, {1: intervention}):
                after = activations(model, 1)
            assert after.dtype == dtype
            wanted = 3.0 if intervention.mode == "clamp" else before @ unit + 3.0
            torch.testing.assert_close(
                after.float() @ unit, torch.as_tensor(wanted).expand(10), rtol=2e-2, atol=5e-2
            )

    def test_kinds_of_vector(self, make_model: Maker) -> None:
        model = make_model()
        found = []
        for kind in (vector(), vector().double(), vector().numpy(), np.asarray(vector(), np.float64)[::1]):
            with steer(model, {1: kind}, strength=3.0):
                found.append(logits(model))
        assert all(torch.equal(found[0], other) for other in found)

    def test_offloaded_by_accelerate(self, tmp_path: Any, make_model: Maker) -> None:
        """The weights of a dispatched model are on the meta device until their layer runs."""
        accelerate = pytest.importorskip("accelerate")
        model = make_model()
        with steer(model, {1: vector()}, strength=[3.0, -3.0]):
            expected = logits(model)
        accelerate.disk_offload(model.model, str(tmp_path), execution_device=torch.device("cpu"))
        assert model.down_weight(1).device.type == "meta"
        mask = torch.ones_like(IDS)
        with torch.no_grad():
            plain = model.model(IDS, attention_mask=mask).logits
            with steer(model, {1: vector()}, strength=[3.0, -3.0]):
                steered = model.model(IDS, attention_mask=mask).logits
            again = model.model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(steered, expected)
        assert torch.equal(plain, again)
        assert not torch.equal(plain, steered)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
def test_compiled(way: str) -> None:
    """Compiled before the block, when Dynamo no longer looks for hooks; its graphs serve again afterwards."""
    network = make_network("llama")
    if way == "wrapped":
        model = LanguageModel(torch.compile(network, backend="eager"), make_tokenizer())
    else:
        model = LanguageModel(network, make_tokenizer())
        for module in [network] if way == "in place" else network.model.layers:
            module.compile(backend="eager")
    plain = logits(model)
    logits(model)
    uncompiled = LanguageModel(make_network("llama"), make_tokenizer())
    with steer(uncompiled, {1: vector()}, strength=3.0):
        expected = logits(uncompiled)
    with steer(model, {1: vector()}, strength=3.0):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        captured = activations(model, 1)
    torch.testing.assert_close(activations(model, 1) + 3 * vector() / vector().norm(), captured)
    assert solve_strength(model, 1, vector(), 0.1, ["the cat"]).reached
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(logits(model), plain)
    assert (plain - expected).abs().max() > 1e-2


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"vector": vector(), "mode": "subtract", "strength": 1.0},
                "mode: wanted one of add, ablate, clamp",
            ),
            ({"strength": 1.0}, "give a vector, neurons, or both"),
            ({"vector": vector()}, "mode 'add' takes a strength, got None"),
            ({"vector": vector(), "mode": "clamp"}, "mode 'clamp' takes a strength"),
            ({"vector": vector(), "mode": "ablate", "strength": 1.0}, "mode 'ablate' takes no strength"),
            ({"vector": vector(), "strength": float("nan")}, "strength: wanted a finite number"),
            ({"vector": vector(), "strength": []}, "strength: wanted a finite number"),
            ({"vector": vector(), "strength": [[1.0]]}, "strength: wanted a finite number"),
            ({"vector": torch.zeros(WIDTH), "strength": 1.0}, "it is zero, and so has no direction"),
            ({"vector": torch.eye(WIDTH)[0], "strength": 1.0, "neurons": [1, 2]}, "zero on the 2 neurons"),
            ({"vector": torch.full((WIDTH,), torch.nan), "strength": 1.0}, "not finite"),
            ({"vector": torch.ones(2, 1, WIDTH), "strength": 1.0}, r"shape \[2, 1, 24\]"),
            ({"vector": torch.ones(0, WIDTH), "strength": 1.0}, r"shape \[0, 24\]"),
            ({"vector": torch.eye(WIDTH)[:2], "strength": 1.0, "neurons": [1, 2]}, "zero on the 2 neurons"),
            ({"vector": vector(), "strength": 1.0, "neurons": [24]}, "are 0-23, got 24"),
            ({"vector": vector(), "strength": 1.0, "neurons": [-1]}, "are 0-23, got -1"),
            ({"neurons": [], "mode": "ablate"}, "at least one whole number"),
            ({"neurons": [0.5], "mode": "ablate"}, "at least one whole number"),
            ({"neurons": torch.ones(WIDTH, dtype=torch.bool), "mode": "ablate"}, "at least one whole number"),
        ],
    )
    def test_intervention(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Intervention(**fields)

    @pytest.mark.parametrize(
        ("interventions", "strength", "error", "message"),
        [
            ({3: vector()}, 1.0, ValueError, "layer 3 is outside"),
            ({"0-1": vector()}, 1.0, ValueError, "one layer for each key, got '0-1'"),
            ({1: vector()}, None, ValueError, "the bare vector for layer 1 needs one"),
            ({1: Intervention(vector(), "ablate")}, 1.0, ValueError, "no bare vector"),
            (
                {1: torch.ones(16)},
                1.0,
                ValueError,
                "wanted 24 entries, one for each neuron of layer 1, got 16",
            ),
            ({1: Intervention(neurons=[24], mode="ablate")}, None, ValueError, "of layer 1 are 0-23, got 24"),
            ({1: ["x"]}, 1.0, TypeError, "layer 1, got str"),
            ({1: Intervention}, 1.0, TypeError, "not iterable|got type"),
        ],
    )
    def test_steer(
        self, interventions: Any, strength: Any, error: type[Exception], message: str, make_model: Maker
    ) -> None:
        with pytest.raises(error, match=message), steer(make_model(), interventions, strength=strength):
            pass

    def test_rows_that_do_not_fit(self, make_model: Maker) -> None:
        model = make_model()
        with (
            steer(model, {1: torch.eye(WIDTH)[:3]}, strength=1.0),
            pytest.raises(ValueError, match="got 3 vectors"),
        ):
            logits(model)
        with pytest.raises(ValueError, match=r"wanted finite values of shape \[d_mlp\], got shape \[3, 24\]"):
            solve_strength(model, 1, torch.eye(WIDTH)[:3], 0.1)

    def test_vector_of_another_kind(self) -> None:
        with pytest.raises(TypeError, match="wanted a torch tensor or numpy array"):
            Intervention([1.0, 2.0], strength=1.0)

    def test_feature(self) -> None:
        A = torch.rand(WIDTH, 40, generator=torch.Generator().manual_seed(0))
        factors = snmf_kernels.fit(A, k=3, max_iter=3)
        chosen = Intervention.feature(factors, 2, mode="clamp", strength=1.0)
        assert torch.equal(chosen.vector, factors.Z[:, 2])
        assert (chosen.mode, chosen.strength) == ("clamp", 1.0)
        with pytest.raises(ValueError, match="there are features 0-2, got 3"):
            Intervention.feature(factors, 3, strength=1.0)
