"""Loading causal language models, and knowing where their MLPs keep their hidden activations.

Whatever the architecture, the site this package reads and steers is the *input of the MLP's down
projection*: the vector over neurons after the non-linearity and, in gated MLPs, after the gate.
:class:`LanguageModel` finds that projection, its weight, the final norm and the unembedding, and settles
which token a text must start with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snmf_kernels import _checks

from . import decoding, gguf_models
from .texts import whole_text

# A document separator that many families were pretrained with, each document behind one of these. Their
# tokenizers do not add it, and what they declare as BOS may be a chat marker that no pretraining document
# began with (SmolLM2's <|im_start|>). On 24 sentences of the bundled corpus SmolLM2's mean
# next-token loss is 4.83 behind nothing and 4.41 behind <|endoftext|>.
_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class _Layout:
    """Attribute paths of a family: block list and final norm in the causal LM, down projection in a block."""

    blocks: str
    down: str
    final_norm: str
    families: str


# Tried in order; a layout fits when all of its paths resolve. The first multimodal path is that of
# transformers >= 4.52.
_LAYOUTS = (
    _Layout("model.layers", "mlp.down_proj", "model.norm", "Llama, Mistral, Gemma 1-3, Qwen2, Qwen3"),
    _Layout(
        "model.language_model.layers",
        "mlp.down_proj",
        "model.language_model.norm",
        "Gemma 3 with vision (text part)",
    ),
    _Layout(
        "language_model.model.layers",
        "mlp.down_proj",
        "language_model.model.norm",
        "the same in older transformers",
    ),
    _Layout("transformer.h", "mlp.c_proj", "transformer.ln_f", "GPT-2"),
    _Layout("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", "GPT-NeoX, Pythia"),
    _Layout("model.decoder.layers", "fc2", "model.decoder.final_layer_norm", "OPT"),
    _Layout("model.layers", "mlp.fc2", "model.final_layernorm", "Phi"),
)


class LanguageModel:
    """A causal language model with the places that this package reads.

    Args:
        model: a Hugging Face causal LM. It is put into eval mode and its parameters stop asking for
            gradients.
        tokenizer: its tokenizer.
        name: how to call it in files and messages.
        source: what :func:`load_model` knows of its origin (kind, path, revision; of a GGUF file sha256, file and
            quantisation).
        start_token: the token put in front of every text: ``"auto"`` (see below), ``None`` for none, a token
            or an id.

    ``start_token="auto"`` takes the token that the tokenizer itself puts in front; else ``<|endoftext|>``
    when the vocabulary has it (the separator between the pretraining documents of GPT-2, GPT-NeoX, Phi, Qwen
    and SmolLM2); else the declared BOS; else none. A model without any attention sink in front makes one of
    its first real token, so a start token is worth having even where it is not mandatory.

    Raises:
        ValueError: the architecture is not one of those known, or it mixes experts; the model is wrapped, in an adapter
            for instance, which is to be merged first.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "model",
        source: dict[str, Any] | None = None,
        start_token: str | int | None = "auto",
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.source = dict(source or {"kind": "object"})
        self._layout = _find_layout(model)
        self._blocks: Any = _resolve(model, self._layout.blocks)
        self._start = _start_token_id(tokenizer, start_token)
        self._specials = _special_ids(tokenizer)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self._blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.down_weight(0).shape[0])

    def d_mlp(self, layer: int) -> int:
        """Number of neurons of ``layer``'s MLP (the width of the input of its down projection)."""
        return int(self.down_weight(layer).shape[1])

    @property
    def device(self) -> torch.device:
        """Where the parameters are.

        Raises:
            ValueError: they are offloaded.
        """
        device: torch.device = next(self.model.parameters()).device
        if device.type == "meta":
            raise _offloaded(next(self.model.named_parameters())[0])
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def max_positions(self) -> int | None:
        """The longest text in tokens that the configuration declares, or None."""
        value = getattr(self._text_config, "max_position_embeddings", None)
        return int(value) if value else None

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    def block(self, layer: int) -> nn.Module:
        """The transformer block: attention and MLP."""
        module: nn.Module = self._blocks[self._checked(layer)]
        return module

    def down_projection(self, layer: int) -> nn.Module:
        """The module whose input holds the neurons' activations: ``[..., d_mlp] -> [..., d_model]``."""
        return _resolve(self.block(layer), self._layout.down)

    def down_weight(self, layer: int) -> Tensor:
        """Its weight as ``[d_model, d_mlp]``, a view: ``W_down @ z`` is what a neuron vector writes."""
        module: Any = self.down_projection(layer)
        return module.weight if isinstance(module, nn.Linear) else module.weight.T

    def down_bias(self, layer: int) -> Tensor | None:
        """Its bias ``[d_model]``, or None."""
        bias: Tensor | None = self.down_projection(layer).bias  # type: ignore[assignment]
        return bias

    def output_norm(self, layer: int) -> nn.Module | None:
        """The norm between the down projection and the residual stream (Gemma 2 and 3), or None."""
        norm: nn.Module | None = getattr(self.block(layer), "post_feedforward_layernorm", None)
        return norm

    def output_weight(self, layer: int) -> Tensor:
        """``[d_model, d_mlp]``: ``output_weight @ z`` is what a neuron vector adds to the residual stream.

        That is ``W_down``, and where a norm follows it (Gemma 2 and 3) each of its rows times that norm's gain. The
        norm also divides by the length of all that the MLP writes on a token, one factor for all directions.

        Raises:
            ValueError: the weight is offloaded.
        """
        weight, norm = self.down_weight(layer), self.output_norm(layer)
        if weight.device.type == "meta":
            raise _offloaded(f"{self._layout.blocks}.{layer}.{self._layout.down}.weight")
        if norm is None:
            return weight
        # Of a vector of ones only the gain is left, whatever the module adds to its parameter.
        ones = torch.ones(weight.shape[0], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            gain: Tensor = norm(ones)
            return gain[:, None] * weight

    @property
    def final_norm(self) -> nn.Module:
        """The norm in front of the unembedding."""
        return _resolve(self.model, self._layout.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        """``[..., d_model] -> [..., vocabulary]``."""
        module: nn.Module = self.model.get_output_embeddings()
        return module

    def hook_name(self, layer: int) -> str:
        """The site in TransformerLens's naming: ``blocks.{layer}.mlp.hook_post``."""
        return f"blocks.{self._checked(layer)}.mlp.hook_post"

    def hf_hook_name(self, layer: int) -> str:
        """The site by its real module path, e.g. ``model.layers.3.mlp.down_proj.input``."""
        return f"{self._layout.blocks}.{self._checked(layer)}.{self._layout.down}.input"

    def logit_lens(self, vectors: Tensor) -> Tensor:
        """``unembed(final_norm(v))`` for residual directions ``[m, d_model]`` -> float32 logits ``[m,
        vocabulary]``.

        The final norm removes a direction's length, so only its direction matters: that of
        ``output_weight @ z`` for a feature. A logit soft cap is monotone and left out.
        """
        with torch.inference_mode():
            logits: Tensor = self.unembedding(self.final_norm(vectors.to(self.device, self.dtype)))
        return logits.float()

    def parse_layers(self, layers: str | int | Iterable[int | str]) -> list[int]:
        """Layers from ``"0-3,6"``, ``"all"``, a number, a list, or hook names of either naming.

        Returns:
            The layer numbers in ascending order, each once.

        Raises:
            ValueError: a part cannot be read or lies outside the model.
        """
        if isinstance(layers, str):
            parts: list[int | str] = [part.strip() for part in layers.split(",") if part.strip()]
        elif isinstance(layers, int):
            parts = [layers]
        else:
            parts = list(layers)
        if not parts:
            raise ValueError("layers is empty; give for instance '0-3,6', 'all' or a hook name")
        found: set[int] = set()
        for part in parts:
            found.update(self._layers_of(part))
        return sorted(found)

    def _layers_of(self, part: int | str) -> Sequence[int]:
        if isinstance(part, int):
            return [self._checked(part)]
        if part == "all":
            return range(self.n_layers)
        if match := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part):
            first = self._checked(int(match[1]))
            last = self._checked(int(match[2])) if match[2] else first
            if last < first:
                raise ValueError(f"layers: the range {part!r} runs backwards; write it as '{last}-{first}'")
            return range(first, last + 1)
        if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_post", part):
            return [self._checked(int(match[1]))]
        path = rf"{re.escape(self._layout.blocks)}\.(\d+)\.{re.escape(self._layout.down)}(?:\.input)?"
        if match := re.fullmatch(path, part):
            return [self._checked(int(match[1]))]
        raise ValueError(
            f"layers: cannot read {part!r}; wanted numbers and ranges such as '0-3,6', 'all', "
            f"{self.hook_name(0)!r} or {self.hf_hook_name(0)!r}"
        )

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is outside {self.name}, which has layers 0-{self.n_layers - 1}")
        return layer

    @property
    def start_token_id(self) -> int | None:
        """The id put in front of every text, or None when there is none."""
        return self._start

    @property
    def pad_id(self) -> int:
        """The id that fills short rows of a batch, where the attention mask hides it; see :func:`padding_id`."""
        return padding_id(self.model, self.tokenizer)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are marks of structure and not text: BOS, EOS, padding and every other special token."""
        return self._specials

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of ``text`` behind the start token, at most ``max_tokens`` in all.

        Raises:
            ValueError: the model has no embedding for one of them (the message names the token).
        """
        ids: list[int] = self.tokenizer(whole_text(text), add_special_tokens=False)["input_ids"]
        if self._start is not None:
            ids = [self._start, *ids]
        return check_ids(self.model, self.tokenizer, ids[:max_tokens])

    def token_text(self, token_id: int) -> str:
        """One token as text with its leading space; U+FFFD stands for a piece of a character."""
        return decoding.token_text(self.tokenizer, token_id)

    def fingerprint(self) -> str:
        """A short hash of the parameters: see :func:`fingerprint`."""
        return fingerprint(self.model)

    def not_finite(self) -> str | None:
        """Which weight is not finite, in words, or None if all are."""
        return _not_finite(self.model)


def padding_id(network: Any, tokenizer: Any) -> int:
    """The tokenizer's padding id; 0 where it has none, or the network no embedding for it. Padding is masked."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and 0 <= pad < _n_embeddings(network) else 0


def check_ids(network: Any, tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids of a text.

    Raises:
        ValueError: the network has no embedding for one of them.
    """
    rows = _n_embeddings(network)
    if outside := next((id for id in ids if id >= rows), None):
        token = tokenizer.convert_ids_to_tokens([outside])[0]
        raise ValueError(
            f"texts: the token {token!r} has the id {outside}, and the model has embeddings for {rows} ids; use the "
            "tokenizer that the model was trained with, or leave the token out"
        )
    return ids


def _n_embeddings(network: Any) -> int:
    return int(network.get_input_embeddings().weight.shape[0])


def _not_finite(network: nn.Module) -> str | None:
    """Which parameter is not finite, in words; one pass over all of them, without copies."""
    for name, parameter in network.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point() or not parameter.numel():
            continue
        low, high = torch.aminmax(parameter.detach())
        if bool(low.isfinite() and high.isfinite()):
            continue
        if parameter.dtype == torch.float16 and not bool(low.isnan()):
            return f"the weight {name} has values that float16 cannot hold; load it in bfloat16 or float32"
        kind = "NaN" if bool(low.isnan()) else "infinite values"
        return f"the weight {name} has {kind}; the checkpoint is damaged, or its training diverged"
    return None


def _offloaded(weight: str) -> ValueError:
    return ValueError(
        f"model: {weight} is offloaded, or was not loaded, and cannot be read; load the model on one device, without "
        "device_map or cpu_offload"
    )


def fingerprint(network: nn.Module) -> str:
    """A short hash of names, shapes and 64 spread values of every parameter: two fine-tunes differ in it.

    The values are read as float32, so that a checkpoint keeps its fingerprint on another device. A network that
    ``torch.compile`` has wrapped has the fingerprint of the network.

    Raises:
        ValueError: parameters are offloaded.
    """
    network = getattr(network, "_orig_mod", network)
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, parameter in network.named_parameters():
        if parameter.device.type == "meta":
            raise _offloaded(name)
        flat = parameter.detach().reshape(-1)
        count = min(64, flat.numel())
        where = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        values = flat[where].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    start_token: str | int | None = "auto",
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a bundled name (``"smollm2-135m"``, ``"gemma-3-270m"``), a ``.gguf`` file, a local
            folder, or a Hub id. Bundled names and files never touch the network. GGUF files are converted
            once and kept under :func:`snmf_interp.gguf_models.cache_dir`.
        device: where to put it; by default CUDA when there is one, else the CPU.
        dtype: of the parameters: ``torch.float32``, ``torch.bfloat16`` or ``torch.float16``.
        revision: a Hub branch, tag or commit.
        trust_remote_code: let transformers run code from the Hub repository.
        start_token: see :class:`LanguageModel`.

    Raises:
        FileNotFoundError: a path that is not there.
        ModuleNotFoundError: a package that holds a bundled model is not installed (the message says how to
            install it).
        ValueError: the file, folder or repository cannot be read as a causal LM, lacks weights or a tokenizer, or its
            architecture is not known.
    """
    network, tokenizer, source = load_network(
        name_or_path, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    return LanguageModel(network, tokenizer, name=str(name_or_path), source=source, start_token=start_token)


def load_network(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, dict[str, Any]]:
    """The Hugging Face model and tokenizer of :func:`load_model`, and where they came from.

    For models that are asked rather than read: their MLPs may be of any kind. Arguments and errors are those
    of :func:`load_model`.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: wanted torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    where = _checks.device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = str(name_or_path)
    path = Path(name).expanduser()
    source: dict[str, Any]
    if name in gguf_models.BUNDLED:
        folder, file = gguf_models.bundled_folder(name)
        target, source, local = str(folder), {"kind": "bundled", **file}, True
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {name!r} is a file, but not a .gguf file; give its folder, or a Hub id")
        folder, file = gguf_models.converted_folder(path)
        target, source, local = (
            str(folder),
            {"kind": "gguf", "path": str(path.resolve()), **file},
            True,
        )
    elif path.is_dir():
        target, source, local = str(path), {"kind": "folder", "path": str(path.resolve())}, True
    elif (
        path.suffix == ".gguf"
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or name.endswith("/")
    ):
        raise FileNotFoundError(f"model {name!r}: there is no such file or folder")
    elif "/" in name and path.parent.is_dir() and _hub_folder(name, revision) is None:
        raise FileNotFoundError(
            f"model {name!r}: the folder {str(path.parent)!r} has no folder {path.name!r}; "
            "a model of that name on the Hub is asked for from another working directory"
        )
    else:
        target, source, local = name, {"kind": "hub"}, False
    model, tokenizer = _read(name, target, local, dtype, revision, trust_remote_code)
    if not local:
        source["revision"] = getattr(model.config, "_commit_hash", None) or revision
    model.to(where)
    if (wrong := _not_finite(model)) is not None:
        raise ValueError(f"model {name!r}: {wrong}")
    return model, tokenizer, source


def _read(
    name: str, target: str, local: bool, dtype: torch.dtype, revision: str | None, trusted: bool
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, or of a Hub id."""
    from transformers import AutoConfig

    if local and (Path(target) / "adapter_config.json").is_file():
        raise ValueError(
            f"model {name!r} is an adapter, not a model; merge it first: load it with peft, and save what "
            "merge_and_unload() gives"
        )
    unreachable = None if local else _why_unreachable(target, revision)
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trusted,
        "local_files_only": local or unreachable is not None,
    }
    known = (
        f"wanted a Hub id, a local folder, a .gguf file, or one of {', '.join(sorted(gguf_models.BUNDLED))}"
    )

    def refused(error: Exception) -> ValueError:
        if "trust_remote_code" in str(error):
            return ValueError(
                f"model {name!r} has code of its own, which is run only if you trust it: --trust-remote-code "
                "(trust_remote_code=True), for a run SNMF_TRUST_REMOTE_CODE=1"
            )
        if unreachable is not None and _hub_folder(target, revision) is None:
            reason = f"the Hub could not be reached ({unreachable}), and its cache here has no such model"
        else:
            reason = _in_one_line(error)
        return ValueError(f"cannot load {name!r} as a causal language model: {reason} ({known})")

    # The configuration, the tokenizer and the weights each fail for reasons of their own. Whatever files of others
    # hold, libraries raise errors of many kinds about it.
    try:
        AutoConfig.from_pretrained(target, **common)
    except ImportError:
        raise
    except Exception as error:
        raise refused(error) from error
    folder = Path(target) if local else _hub_folder(target, revision)
    tokenizer = _read_tokenizer(name, target, folder, common)
    try:
        return gguf_models.read_network(target, name, dtype=dtype, **common), tokenizer
    except (ImportError, MemoryError, torch.OutOfMemoryError, gguf_models.IncompleteCheckpointError):
        raise
    except Exception as error:
        if folder is not None and (damaged := _damaged_weights(folder)) is not None:
            converted = folder.parent == gguf_models.cache_dir() / "models"
            remedy = "delete its folder, and it is converted again" if converted else "get it again"
            raise ValueError(
                f"model {name!r}: {damaged[0]} is damaged or incomplete ({damaged[1]}); {remedy}"
            ) from error
        raise refused(error) from error


def _read_tokenizer(name: str, target: str, folder: Path | None, common: dict[str, Any]) -> Any:
    """The tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    where = folder or target
    remedy = f"put its tokenizer there: tokenizer.save_pretrained({str(where)!r})"
    try:
        with gguf_models.quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(target, **common)
    except ImportError:
        raise
    except Exception as error:
        files = () if folder is None else (path.name for path in folder.iterdir())
        if folder is not None and not any(re.search(r"token|vocab|merges|\.model$", file) for file in files):
            raise ValueError(f"model {name!r}: there is no tokenizer in {where}; {remedy}") from error
        raise ValueError(
            f"model {name!r}: the tokenizer in {where} cannot be read: {_in_one_line(error)}; {remedy}"
        ) from error
    # Without its files transformers makes an empty tokenizer for many families.
    if set(tokenizer.get_vocab().values()) <= _special_ids(tokenizer):
        raise ValueError(f"model {name!r}: there is no tokenizer in {where}, or one without a word; {remedy}")
    return tokenizer


def _hub_folder(name: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache that holds the configuration of a model, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _why_unreachable(name: str, revision: str | None) -> str | None:
    """Why the Hub does not answer now, or None if it does.

    Asked once: libraries ask for each file and wait half a minute, also for what is in their cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except HFValidationError:
        return None
    except HfHubHTTPError as error:
        # Anything but a fault of the server is an answer, which loading will explain.
        status = getattr(error.response, "status_code", 0)
        return f"it answers {status}" if status >= 500 or status == 429 else None
    except Exception as error:  # Of whichever HTTP library the Hub's client uses.
        return _in_one_line(error)
    return None


def _damaged_weights(folder: Path) -> tuple[Path, str] | None:
    """The first file of weights that cannot be read, and why; None if all can."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if (reason := _why_unreadable(path)) is not None:
            return path, reason
    return None


def _why_unreadable(path: Path) -> str | None:
    from safetensors import safe_open

    try:
        if path.suffix == ".bin":
            torch.load(path, map_location="meta", weights_only=True)
        else:
            with safe_open(path, framework="pt"):
                pass
    except Exception as error:  # Of safetensors, pickle, zip files, or torch.
        return _in_one_line(error)
    return None


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _resolve(module: nn.Module, path: str) -> nn.Module:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        raise AttributeError(f"{path} is not a module")
    return found


def _find_layout(model: nn.Module) -> _Layout:
    """The layout of a model; the error says what was looked for, or what the model is wrapped in."""
    if any(cls.__name__ == "PeftModel" for cls in type(model).__mro__) or hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{type(model).__name__} is an adapter around a model; merge it first: model.merge_and_unload()"
        )
    found = _fitting_layout(model)
    if isinstance(found, _Layout):
        return found
    # Layers that peft puts around those of a model, each with the original as its base_layer.
    adapted = next((name for name, part in model.named_modules() if hasattr(part, "base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"{type(model).__name__} has an adapter at {adapted}; merge it first, with peft's merge_and_unload()"
        )
    for name, part in model.named_modules():
        if name and hasattr(part, "get_output_embeddings") and isinstance(_fitting_layout(part), _Layout):
            raise ValueError(
                f"{type(model).__name__} wraps a {type(part).__name__}; give that: its part {name!r}"
            )
    looked = "; ".join(f"{layout.blocks}.N.{layout.down} ({layout.families})" for layout in _LAYOUTS)
    detail = f" Closest: {found[-1]}." if found else ""
    if any("experts" in name for name, _ in model.named_modules()):
        detail += (
            " It mixes experts: each expert has a down projection of its own, which is not supported yet."
        )
    raise ValueError(
        f"{type(model).__name__} has no MLP down projection that is known here.{detail} Looked for {looked}"
    )


def _fitting_layout(model: nn.Module) -> _Layout | list[str]:
    """The first layout whose paths all resolve and whose projections have the shape of a down projection.

    If there is none, why not, of those layouts whose blocks are there.
    """
    refused: list[str] = []
    for layout in _LAYOUTS:
        try:
            blocks: Any = _resolve(model, layout.blocks)
            _resolve(model, layout.final_norm)
        except AttributeError:
            continue
        reason = next((r for i, block in enumerate(blocks) if (r := _why_not(block, layout, i))), None)
        if len(blocks) and reason is None:
            return layout
        refused.append(reason or f"{layout.blocks} is empty")
    return refused


def _why_not(block: nn.Module, layout: _Layout, index: int) -> str | None:
    """Why ``block`` does not fit ``layout``, or None when it does."""
    try:
        module: Any = _resolve(block, layout.down)
    except AttributeError:
        return f"block {index} has no {layout.down}"
    # GPT-2's Conv1D keeps its weight as [in, out]. Known by name, for transformers has moved the class
    # before.
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return f"{layout.down} of block {index} is a {type(module).__name__}, not a Linear or Conv1D"
    return None


def _start_token_id(tokenizer: Any, choice: str | int | None) -> int | None:
    if choice is None:
        return None
    if isinstance(choice, int):
        if not 0 <= choice < len(tokenizer):
            raise ValueError(f"start_token: id {choice} is outside the vocabulary of {len(tokenizer)} tokens")
        return choice
    vocabulary = tokenizer.get_vocab()
    if choice != "auto":
        if choice not in vocabulary:
            raise ValueError(
                f"start_token: {choice!r} is not in the vocabulary; give 'auto', None, a token or an id"
            )
        return int(vocabulary[choice])
    own = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    if len(own) > len(bare) and own[0] != bare[0]:
        return int(own[0])
    if _SEPARATOR in vocabulary:
        return int(vocabulary[_SEPARATOR])
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
