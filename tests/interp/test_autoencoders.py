"""Sparse autoencoders as rivals, with SAELens itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snmf_interp.autoencoders import (
    AutoencoderDictionary,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)

pytest.importorskip("sae_lens")


def planted(n: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that each have one of four orthogonal directions: ``A [16, n]`` and the directions ``[4, 16]``."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:4]
    which = torch.randint(4, (n,), generator=generator)
    strength = 1 + torch.rand(n, 1, generator=generator)
    return (strength * directions[which]).T.contiguous(), directions


OPTIONS: dict[str, Any] = {"active": 1, "steps": 400, "batch_size": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def trained() -> AutoencoderDictionary:
    return train_autoencoder(planted()[0], 8, **OPTIONS)


def test_finds_planted_directions(trained: AutoencoderDictionary) -> None:
    A, directions = planted()
    assert trained.residual(A.T) < 0.1
    found = torch.stack([trained.direction(i) for i in range(trained.size)])
    cosine = torch.nn.functional.cosine_similarity(found[:, None], directions[None], dim=2)
    assert bool((cosine.amax(0) > 0.9).all())
    codes = trained.encode(A.T)
    assert codes.shape == (600, 8)
    assert float(codes.min()) >= 0
    assert int((codes > 0).sum(1).max()) == 1


def test_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_autoencoder(planted()[0], 4, **OPTIONS | {"steps": 3})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = train_autoencoder(planted()[0], 4, **OPTIONS | {"steps": 3})
    other = train_autoencoder(planted()[0], 4, **OPTIONS | {"steps": 3, "seed": 1})
    assert torch.equal(first.direction(0), again.direction(0))
    assert not torch.equal(first.direction(0), other.direction(0))


def test_sees_scaled_neurons() -> None:
    A, _ = planted()
    scale = torch.linspace(0.5, 2, 16)
    plain = train_autoencoder(A, 4, **OPTIONS | {"steps": 20})
    scaled = train_autoencoder(A * scale[:, None], 4, neuron_scale=scale, **OPTIONS | {"steps": 20})
    assert torch.allclose(scaled.encode((A * scale[:, None]).T), plain.encode(A.T), atol=1e-4)
    assert torch.allclose(scaled.direction(2), plain.direction(2) * scale, atol=1e-4)
    text_of = torch.arange(600) // 6
    scores = plain.scores(A.T, text_of, 101)
    assert torch.allclose(scores[:, :100], plain.encode(A.T).reshape(100, 6, 4).amax(1).T)
    assert scores[:, 100].tolist() == [0.0] * 4


def test_saved_and_loaded(trained: AutoencoderDictionary, tmp_path: Path) -> None:
    save_autoencoder(trained, tmp_path / "sae")
    A, _ = planted()
    loaded = load_autoencoder(str(tmp_path / "sae"))
    assert torch.equal(loaded.encode(A.T) > 0, trained.encode(A.T) > 0)
    assert loaded.residual(A.T) == pytest.approx(trained.residual(A.T), rel=1e-4)
    # Lengths are folded into the latents.
    cosine = torch.nn.functional.cosine_similarity(loaded.direction(3), trained.direction(3), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_over_the_output_of_the_mlp(family: str, make_model: Any, tmp_path: Path) -> None:
    """Its latents are those of what the MLP writes, and its directions write what they say."""
    from snmf_interp import hooks

    model = make_model(family)
    saved = train_autoencoder(torch.randn(16, 200), 4, **OPTIONS | {"steps": 5})
    save_autoencoder(saved, tmp_path / "sae")
    ids = torch.tensor([model.encode("the cat sat on the mat")])
    written: list[torch.Tensor] = []
    block = model.block(1)
    norm = getattr(block, "post_feedforward_layernorm", None)
    if norm is not None:
        # Its gain is the same for all channels in a new model, and would not be seen.
        with torch.no_grad():
            norm.weight.copy_(2 * torch.rand(16, generator=torch.Generator().manual_seed(3)))
    rival = load_autoencoder(str(tmp_path / "sae"), model, 1)
    module = norm or block.mlp
    handle = module.register_forward_hook(lambda _module, _inputs, output: written.append(output.detach()))
    with hooks.capture(model, [1]) as captured:
        hooks.forward(model, ids, torch.ones_like(ids))
    handle.remove()
    expected = rival.sae.encode(written[0][0])
    assert torch.allclose(rival.encode(captured[1][0]), expected, atol=1e-4)
    direction = rival.direction(2)
    assert direction.shape == (24,)
    # What a small step along it changes at the output: the latent's direction, and a norm's shrinking of the rest.
    assert rival.output is not None
    step = 1e-3 * direction
    change = (rival.output(captured[1][0] + step) - rival.output(captured[1][0])) / 1e-3
    rest = rival.output(captured[1][0])
    for row, along in zip(change, rest, strict=True):
        basis = (
            torch.stack([rival.sae.W_dec[2].detach(), along])
            if family == "gemma3"
            else rival.sae.W_dec[2].detach()[None]
        )
        explained = torch.linalg.lstsq(basis.T, row[:, None]).solution
        assert float((basis.T @ explained - row[:, None]).norm() / row.norm()) < 1e-2


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.hook_resid_post", r"reads blocks\.1\.hook_resid_post"),
        ("blocks.1.attn.hook_z", r"reads blocks\.1\.attn\.hook_z"),
        ("blocks.1.hook_mlp_in", r"reads blocks\.1\.hook_mlp_in"),
        ("blocks.2.hook_mlp_out", r"reads layer 2 \(blocks\.2\.hook_mlp_out\), not 1; write \{layer\}"),
        ("blocks.1.hook_mlp_out", None),
        ("model.layers.1.mlp", None),
    ],
)
def test_reads_the_mlp_of_the_layer(hook: str, message: str | None, make_model: Any, tmp_path: Path) -> None:
    """All of these have the width of the MLP's output."""
    saved = train_autoencoder(torch.randn(16, 200), 4, **OPTIONS | {"steps": 1})
    saved.sae.cfg.metadata.hook_name = hook
    save_autoencoder(saved, tmp_path / "sae")
    if message is None:
        assert load_autoencoder(str(tmp_path / "sae"), make_model(), 1).write is not None
    else:
        with pytest.raises(ValueError, match=message):
            load_autoencoder(str(tmp_path / "sae"), make_model(), 1)


def test_what_it_does_not_say_is_told(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = train_autoencoder(torch.randn(16, 200), 4, **OPTIONS | {"steps": 1})
    save_autoencoder(saved, tmp_path / "unknown")
    load_autoencoder(str(tmp_path / "unknown"), make_model(), 1)
    assert "does not say what it reads" in caplog.text
    saved.sae.cfg.metadata.hook_name = "blocks.1.mlp.hook_post"
    saved.sae.cfg.metadata.model_name = "gpt2-small"
    save_autoencoder(saved, tmp_path / "other")
    load_autoencoder(str(tmp_path / "other"), make_model(), 1)
    assert "was trained on gpt2-small" in caplog.text
    caplog.clear()
    model = make_model()
    model.name = "openai-community/gpt2"
    load_autoencoder(str(tmp_path / "other"), model, 1)
    assert not caplog.text


def test_errors(make_model: Any, tmp_path: Path) -> None:
    A = planted()[0]
    for change, message in (
        ({"active": 5}, "active: wanted 1 to k = 4, got 5"),
        ({"steps": 0}, "steps: wanted at least 1"),
        ({"batch_size": 0}, "batch_size: wanted at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train_autoencoder(A, 4, **OPTIONS | change)
    with pytest.raises(FileNotFoundError, match="RELEASE/SAE_ID"):
        load_autoencoder(str(tmp_path / "none").replace("/", "\\"))
    with pytest.raises(FileNotFoundError, match="SAELens cannot load"):
        load_autoencoder("no-such-release/layer_0")
    save_autoencoder(train_autoencoder(torch.randn(7, 100), 2, **OPTIONS | {"steps": 1}), tmp_path / "narrow")
    with pytest.raises(ValueError, match="24 neurons or 16 outputs"):
        load_autoencoder(str(tmp_path / "narrow"), make_model(), 1)
