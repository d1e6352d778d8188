"""The result object: views, encoder, files."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading

import numpy as np
import pytest
import torch
from problems import planted
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import nnls

from snmf_kernels import Factorization, StopReason, fit


@pytest.fixture(scope="module")
def fitted():
    A, _, _ = planted(90, 200, 6, keep=0.1, noise=0.3)
    return A, fit(A, 6, keep=0.1, max_iter=40)


def test_views(fitted):
    _, result = fitted
    assert result.W_dec.shape == (6, 90)
    assert result.feature_acts.shape == (200, 6)
    assert result.W_dec.data_ptr() == result.Z.data_ptr()
    assert result.feature_acts.data_ptr() == result.Y.data_ptr()
    assert result.W_dec.is_contiguous(), "a feature's neurons lie together"
    assert result.k == 6
    assert "relative_error" in repr(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("neuron_scale", [None, "rms"])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_encode_solves_non_negative_least_squares(dtype, neuron_scale, backend):
    A, _, _ = planted(90, 200, 6, keep=0.1, noise=0.3)
    result = fit(
        A.double() if dtype == torch.float64 else A, 6, keep=0.1, max_iter=40, neuron_scale=neuron_scale
    )
    new = planted(90, 25, 6, keep=0.1, noise=0.3, seed=8)[0].to(dtype)
    encoding = result.encode(new, tol=1e-6, backend=backend)
    weights = 1 / result.neuron_scale.double() if neuron_scale else torch.ones(90).double()
    Z = (result.Z.double() * weights[:, None]).numpy()
    wanted = np.stack([nnls(Z, (new[:, i].double() * weights).numpy())[0] for i in range(25)], axis=1)
    assert encoding.kkt_residual <= 1e-6
    assert np.linalg.norm(encoding.Y.double().numpy() - wanted) < 1e-4 * np.linalg.norm(wanted)
    exact = (
        new.double() - result.Z.double() @ torch.from_numpy(wanted)
    ).square().sum() / new.double().square().sum()
    assert encoding.relative_error == pytest.approx(float(exact), rel=1e-4)


def test_encode_never_does_worse_than_the_fit(fitted):
    A, result = fitted
    assert result.encode(A).relative_error <= result.relative_error * (1 + 1e-5)


def test_encode_reports_a_residual_it_did_not_reach(fitted):
    A, result = fitted
    rough, fine = result.encode(A, max_sweeps=1), result.encode(A, tol=1e-6)
    assert rough.kkt_residual > 1e-3
    assert fine.kkt_residual <= 1e-6
    assert rough.relative_error > fine.relative_error


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_tokens_are_encoded_by_themselves(fitted, backend):
    A, result = fitted
    # Neighbours that converge at their own pace, one of them loud, stop each other only within the tolerance.
    A = torch.cat([A, 1e3 * A[:, :1], torch.zeros(90, 1)], 1)
    whole = result.encode(A, tol=1e-6, backend=backend).Y
    parts = [result.encode(part, tol=1e-6, backend=backend).Y for part in (A[:, :7], A[:, 7:71], A[:, 71:])]
    for got, wanted in zip(whole.T, torch.cat(parts, 1).T, strict=True):
        assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm())
    assert not bool(whole[:, -1].any())


def test_encode_errors(fitted):
    _, result = fitted
    with pytest.raises(ValueError, match=r"A: wanted 90 rows \(neurons\), as Z has, got shape \(5, 3\)"):
        result.encode(torch.ones(5, 3))
    with pytest.raises(ValueError, match="tol: wanted a number > 0"):
        result.encode(torch.ones(90, 3), tol=0)
    with pytest.raises(ValueError, match="max_sweeps: wanted an integer >= 1"):
        result.encode(torch.ones(90, 3), max_sweeps=0)
    with pytest.raises(ValueError, match="1 of 270 NaN or infinite"):
        result.encode(
            torch.ones(90, 3).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(torch.nan))
        )


def test_encode_notices_overflow(fitted):
    _, result = fitted
    for value, dtype in ((1e60, torch.float64), (3e38, torch.float32)):
        with pytest.raises(ValueError, match="A: its values are too large for float32"):
            result.encode(torch.full((90, 4), value, dtype=dtype))


@pytest.mark.parametrize("neuron_scale", [None, "rms"])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_save_and_load(tmp_path, neuron_scale, as_numpy):
    A = planted(90, 200, 6, keep=0.1, noise=0.3)[0]
    result = fit(A.numpy() if as_numpy else A, 6, keep=0.1, max_iter=5, neuron_scale=neuron_scale)
    path = tmp_path / "deep" / "factors.safetensors"
    result.save(path)
    loaded = Factorization.load(str(path))
    for name in ("Z", "Y", "dead_features"):
        assert np.array_equal(np.asarray(getattr(loaded, name)), np.asarray(getattr(result, name))), name
    for name in ("relative_error", "loss_history", "n_iter", "stop_reason", "backend", "options"):
        assert getattr(loaded, name) == getattr(result, name), name
    assert (loaded.neuron_scale is None) == (neuron_scale is None)
    assert isinstance(loaded.stop_reason, StopReason)
    new = A[:, :10]
    assert torch.allclose(loaded.encode(new).Y, torch.as_tensor(result.encode(new).Y))
    assert [file.name for file in path.parent.iterdir()] == ["factors.safetensors"], (
        "a temporary file was left"
    )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["snmf_kernels"])
    assert header["options"]["keep"] == 0.1
    assert header["torch"] == torch.__version__


def test_save_replaces_whole_or_not_at_all(tmp_path, fitted, monkeypatch):
    _, result = fitted
    path = tmp_path / "f.safetensors"
    result.save(path)
    before = path.read_bytes()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        result.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]
    result.save(path)
    assert path.read_bytes() == before


def test_save_into_a_folder_is_refused(tmp_path, fitted):
    with pytest.raises(ValueError, match="path: wanted a file name, got the folder"):
        fitted[1].save(tmp_path)


def test_damaged_and_foreign_files(tmp_path, fitted):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match="path: no file"):
        Factorization.load(path)
    fitted[1].save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            Factorization.load(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="does not match its checksum"):
        Factorization.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="has no snmf_kernels header"):
        Factorization.load(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"snmf_kernels": json.dumps({"format": "other"})})
    with pytest.raises(ValueError, match="holds 'other'"):
        Factorization.load(path)


def test_a_damaged_header_is_noticed(tmp_path, fitted):
    path = tmp_path / "f.safetensors"
    fitted[1].save(path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(8, header_end, 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(bytes(flipped))
        loaded = None
        with contextlib.suppress(ValueError):
            loaded = Factorization.load(path)
        if loaded is not None:
            # The last digit of a number may be another one, and the number the same.
            assert (loaded.relative_error, loaded.clipped_error, loaded.options) == (
                fitted[1].relative_error, fitted[1].clipped_error, fitted[1].options,
            )  # fmt: skip


def test_a_newer_format_is_refused(tmp_path, fitted):
    path = tmp_path / "f.safetensors"
    fitted[1].save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["snmf_kernels"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    header["format_version"] = 99
    save_file(tensors, path, metadata={"snmf_kernels": json.dumps(header)})
    with pytest.raises(ValueError, match="has format 99, this version reads up to 1; upgrade snmf-kernels"):
        Factorization.load(path)
    header["format_version"] = 1
    del tensors["Y"]
    save_file(tensors, path, metadata={"snmf_kernels": json.dumps(header)})
    with pytest.raises(ValueError, match="lacks Y"):
        Factorization.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_what_is_no_regular_file_is_written_into(tmp_path, fitted):
    fifo, plain = tmp_path / "fifo", tmp_path / "plain"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    fitted[1].save(fifo)
    reader.join(20)
    fitted[1].save(plain)
    assert read == [plain.read_bytes()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "plain"]


def test_a_link_stays_one(tmp_path, fitted):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("older")
    link.symlink_to(target)
    fitted[1].save(link)
    assert link.is_symlink()
    assert Factorization.load(target).k == fitted[1].k


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(tmp_path, fitted, umask, mode):
    before = os.umask(umask)
    try:
        fitted[1].save(tmp_path / "f.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f.safetensors").stat().st_mode) == mode
