"""Sparse autoencoders as rivals: one trained here on the same activations, or a published one. Needs ``sae-lens``.

    rival = train_autoencoder(A, k=100, active=12, neuron_scale=factors.neuron_scale)
    rival = load_autoencoder("gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k/canonical", model, layer=12)

Training, architectures and files are SAELens's (https://github.com/decoderesearch/SAELens); this module chooses the
setting and puts the result where features are: over the neurons of a layer.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import foreign_bars
from .concepts import text_maxima

if TYPE_CHECKING:
    from .models import LanguageModel

# Adam steps and tokens a step. At 7,100 tokens and k = 100 the residual is .677 after 1,000 steps and .674 after
# 3,000 in SmolLM2-135M's layer 10, .587 and .584 in Gemma-3-270M's layer 8.
_STEPS, _BATCH = 1500, 512
_LEARNING_RATE = 1e-3
_TOKENS = 4096
# Names of the sites that are steered and collected, as TransformerLens and transformers have them.
_SITE = re.compile(r"(mlp\.hook_post|hook_mlp_out|\.mlp|down_proj|post_feedforward_layernorm)$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AutoencoderDictionary:
    """The latents of an autoencoder over a layer's neurons, or over what its MLP writes.

    A token's scores are its latent activations. Directions over what the MLP writes, ``[d_model]``, are steered
    at the neurons too, by the smallest change of them that writes that direction.

    Attributes:
        sae: a SAELens autoencoder.
        name: of the method.
        scale: ``[d_mlp]``: what it sees the activations divided by; None for as they are.
        output: from activations ``[n, d_mlp]`` to what it encodes; None for the activations.
        write: ``[d_model, d_mlp]``, what the MLP writes for a small change of its neurons, up to one factor, where the
            directions are those of its output: :meth:`LanguageModel.output_weight`.
    """

    sae: Any
    name: str = "sae"
    scale: Tensor | None = None
    output: Callable[[Tensor], Tensor] | None = None
    write: Tensor | None = None
    concepts: None = None

    @property
    def size(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    def encode(self, activations: Tensor) -> Tensor:
        """Latent activations ``[n, size]`` of ``activations [n, d_mlp]``, float32."""
        return torch.cat(list(self._encoded(activations)))

    def _encoded(self, activations: Tensor) -> Iterator[Tensor]:
        for part in activations.split(_TOKENS):
            with torch.no_grad():
                latents = self.sae.encode(self._seen(part)).float().cpu()
            yield latents

    def scores(self, activations: Tensor, text_of: Tensor, n_texts: int) -> Tensor:
        """See :class:`snmf_interp.dictionaries.Dictionary`."""
        return text_maxima((part.T for part in self._encoded(activations)), text_of, n_texts)

    def direction(self, index: int) -> Tensor:
        """The decoder's row, in the units of the activations, ``[d_mlp]``."""
        row: Tensor = self.sae.W_dec.detach()[index].cpu().float()
        if self.write is not None:
            solved = torch.linalg.lstsq(self.write.cpu().double(), row.double()[:, None], driver="gelsd")
            return solved.solution[:, 0].float()
        return row if self.scale is None else row * self.scale

    def _seen(self, activations: Tensor) -> Tensor:
        """What it encodes."""
        seen = activations.cpu().float()
        if self.output is not None:
            return self.output(seen)
        return seen if self.scale is None else seen / self.scale

    def residual(self, activations: Tensor) -> float:
        """``‖a − decode(encode(a))‖² / ‖a‖²`` over ``activations [n, d_mlp]``, in the units that it sees."""
        wrong = total = 0.0
        with torch.inference_mode():
            for part in activations.split(_TOKENS):
                seen = self._seen(part)
                wrong += float((seen - self.sae(seen)).square().sum(dtype=torch.float64))
                total += float(seen.square().sum(dtype=torch.float64))
        return wrong / total


def train_autoencoder(
    A: Tensor,
    k: int,
    *,
    active: int,
    neuron_scale: Tensor | None = None,
    steps: int = _STEPS,
    batch_size: int = _BATCH,
    learning_rate: float = _LEARNING_RATE,
    seed: int = 0,
) -> AutoencoderDictionary:
    """Train a TopK autoencoder of k latents on activations.

    The architecture is SAELens's TopK autoencoder (Gao et al. 2024, arXiv:2406.04093), with its auxiliary loss
    for dead latents, activations scaled to a mean norm of √d, Adam with a cosine decay. Tokens are drawn in
    random order, epoch after epoch.

    Args:
        A: activations ``[d, n]``, neurons × tokens, as :func:`snmf_kernels.fit` takes them.
        k: latents.
        active: latents that may be active at a token; for equal terms the mean number of positive coefficients
            of the factorisation that it is compared with.
        neuron_scale: ``[d]``: what to divide each neuron by, as that factorisation did; None for nothing.
        steps, batch_size, learning_rate: of Adam.
        seed: of the start and the order of tokens; torch's global generator is left as it was.

    Raises:
        ModuleNotFoundError: sae-lens is not installed.
        ValueError: ``k``, ``active``, ``steps`` or ``batch_size`` is out of range.
    """
    d, n = A.shape
    for name, value, largest in (("k", k, None), ("active", active, k), ("steps", steps, None)):
        if value < 1 or (largest is not None and value > largest):
            wanted = "at least 1" if largest is None else f"1 to k = {largest}"
            raise ValueError(f"{name}: wanted {wanted}, got {value}")
    if not batch_size >= 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    import_sae_lens()
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    tokens = A.T.float().contiguous() if neuron_scale is None else A.T.float() / neuron_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=d,
                d_sae=k,
                k=active,
                normalize_activations="expected_average_only_in",
                apply_b_dec_to_input=True,
            )
        )
        config = SAETrainerConfig(
            total_training_samples=steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=learning_rate,
            lr_end=learning_rate / 100,
            lr_scheduler_name="cosineannealing",
            dead_feature_window=200,
            n_batches_for_norm_estimate=max(1, min(100, n // batch_size)),
        )
        with foreign_bars.silenced():
            trained = SAETrainer(config, sae, _batches(tokens, batch_size, seed)).fit()
    return AutoencoderDictionary(trained.eval(), scale=neuron_scale)


def load_autoencoder(
    name: str, model: LanguageModel | None = None, layer: int | None = None
) -> AutoencoderDictionary:
    """A published or saved autoencoder.

    Args:
        name: a folder that SAELens wrote (``cfg.json`` and ``sae_weights.safetensors``), or
            ``"release/sae_id"`` of SAELens's list, which is fetched from the Hugging Face Hub.
        model: the model that it belongs to, and
        layer: its layer; to know where its directions act.

    Returns:
        It, over the input of the layer's down projection where its width is d_mlp, over the output of the MLP,
        behind the norm that Gemma 2 and 3 have there, where it is d_model.

    Raises:
        ModuleNotFoundError: sae-lens is not installed.
        FileNotFoundError: no such folder, release or autoencoder.
        ValueError: its width is neither, or it says that it reads something else: the residual stream, say, or another
            layer.
    """
    import_sae_lens()
    from sae_lens import SAE

    if Path(name).is_dir():
        sae = SAE.load_from_disk(name)
    else:
        release, slash, sae_id = name.partition("/")
        if not slash:
            raise FileNotFoundError(
                f"sae: there is no folder {name!r}; wanted one that SAELens wrote, or RELEASE/SAE_ID of its list"
            )
        try:
            sae = SAE.from_pretrained(release, sae_id)
        except (ValueError, OSError) as error:
            raise FileNotFoundError(f"sae: SAELens cannot load {name!r}: {error}") from error
    sae = sae.eval()
    width = int(sae.cfg.d_in)
    if model is None or layer is None:
        return AutoencoderDictionary(sae)
    _check_site(name, sae.cfg.metadata, model, layer)
    if width == model.d_mlp(layer):
        return AutoencoderDictionary(sae)
    if width != model.d_model:
        raise ValueError(
            f"sae: wanted one over {model.d_mlp(layer)} neurons or {model.d_model} outputs of the MLP of layer "
            f"{layer}, got width {width} of {name!r}"
        )
    weight, bias = model.down_weight(layer).detach().cpu().float(), model.down_bias(layer)
    norm = model.output_norm(layer)

    def output(activations: Tensor) -> Tensor:
        written = activations @ weight.T
        if bias is not None:
            written = written + bias.cpu().float()
        if norm is not None:
            written = norm(written.to(model.device, model.dtype)).cpu().float()
        return written

    return AutoencoderDictionary(sae, output=output, write=model.output_weight(layer).detach().cpu().float())


def _check_site(name: str, metadata: Any, model: LanguageModel, layer: int) -> None:
    """That an autoencoder reads the MLP of this layer, by its own words; its width alone says too little.

    The residual stream has the width of the MLP's output, and so has what goes into it.
    """
    hook, made_for = metadata.get("hook_name"), metadata.get("model_name")
    if not hook:
        logger.warning(
            "%s does not say what it reads: it is taken to be over the neurons or the output of the MLP of layer %d",
            name, layer,
        )  # fmt: skip
    elif not _SITE.search(hook):
        raise ValueError(
            f"sae: wanted one over the neurons or the output of an MLP, but {name!r} reads {hook}; "
            "choose another release, such as one of Gemma Scope's -mlp-"
        )
    elif (number := re.search(r"\d+", hook)) and int(number[0]) != layer:
        raise ValueError(
            f"sae: {name!r} reads layer {number[0]} ({hook}), not {layer}; write {{layer}} for the number"
        )
    short = model.name.rpartition("/")[2].lower()
    if made_for and short not in made_for.lower() and made_for.rpartition("/")[2].lower() not in short:
        logger.warning("%s was trained on %s, and %s is another model", name, made_for, model.name)


def save_autoencoder(rival: AutoencoderDictionary, folder: Path) -> None:
    """Write the autoencoder where :func:`load_autoencoder` and SAELens read it, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save = getattr(rival.sae, "save_inference_model", rival.sae.save_model)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        save(str(built))
        try:
            built.rename(folder)
        except OSError:
            # Another process finished the same one first; theirs is as good.
            if not folder.is_dir():
                raise


def _batches(tokens: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of exactly ``size`` tokens for ever, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(len(tokens), generator=generator)])
        yield tokens[waiting[:size]]
        waiting = waiting[size:]


def import_sae_lens() -> None:
    """Raises ModuleNotFoundError, saying what to do, where SAELens is not installed."""
    # It imports wandb, which would otherwise look for an account.
    os.environ.setdefault("WANDB_MODE", "disabled")
    try:
        import sae_lens  # noqa: F401  # to say what to do where it is missing
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sparse autoencoders need SAELens: pip install 'snmf-kernels[sae]', or leave out `sae`"
        ) from error
