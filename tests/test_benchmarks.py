"""The benchmark scripts work: figures that nobody can run again are worth nothing."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import published_iteration

from snmf_interp.joint import JointOptions, joint_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from published import PublishedLoop  # noqa: E402  # after the path


def test_the_baseline_is_the_published_iteration():
    A = torch.randn(60, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loop = PublishedLoop(A, 4, keep=0.1)
    Z, Y, losses = published_iteration(A, loop.Y, 0.1, 10)
    assert [loop.step() for _ in range(10)] == pytest.approx(losses, rel=1e-9)
    assert torch.allclose(loop.Z, Z)
    assert torch.allclose(loop.Y, Y)


def test_gpu_report_runs(tmp_path):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_report.py", "--out", tmp_path, "--smoke"],
        capture_output=True,
        text=True,
        env=os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["stages"]) == {
        "floors", "update", "descent", "products", "pass", "columns", "select", "solve", "fit", "many", "tune",
    }  # fmt: skip
    assert all(rows for rows in report["stages"].values())
    assert all(row["equal"] for row in report["stages"]["select"])


def test_the_gpu_suite_fits_its_time():
    """Where a GPU is lent, a command may take ten minutes."""
    suite = (BENCHMARKS / "gpu_suite.sh").read_text()
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu_suite.sh")], check=True)
    for part in ("check", "report"):
        body = suite.split(f"{part}() {{")[1].split("\n}\n")[0]
        limits = [int(limit) for limit in re.findall(r"stage \w+ (\d+) ", body)]
        assert limits
        assert sum(limits) < 590, part


@pytest.mark.parametrize(
    "script",
    ["defaults/experiment.py", "time_to_loss/benchmark.py", "scaling/benchmark.py", "hierarchy/benchmark.py"],
)
def test_experiments_say_how_they_are_run(script):
    printed = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, text=True, check=True
    )
    assert "report" in printed.stdout


def test_time_to_loss_counts_what_it_says():
    sys.path.insert(0, str(BENCHMARKS / "time_to_loss"))
    try:
        from benchmark import compare
    finally:
        sys.path.pop(0)
    # The loop is best at its third of five iterations, of two seconds each; fit gets there after half a second. Within
    # 1 % are the loop's second and fit's first.
    measured = {
        "seconds_per_published_iteration": 2.0,
        "seconds": [0.25, 0.5, 0.75],
        "losses": [6.05, 6.0, 4.5],
    }
    assert compare([10.0, 6.04, 6.0, 7.0, 6.5], measured) == {
        "fit_seconds": 0.5,
        "published_seconds": 10.0,
        "first": 12.0,
        "whole": 20.0,
        "near": 16.0,
        "final": 0.75,
    }


class TestHierarchyBaseline:
    """The loop that joint fine-tuning is measured against does what it is said to do."""

    @pytest.fixture
    def script(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS / "hierarchy"))
        # Another script of the same name may have been imported.
        sys.modules.pop("benchmark", None)
        yield importlib.import_module("benchmark")
        sys.modules.pop("benchmark", None)

    def start(self, script):
        generator = torch.Generator().manual_seed(0)
        A = torch.rand(50, 8, generator=generator) @ torch.rand(8, 200, generator=generator)
        return A, script.start_of(A, [8, 4, 2], keep=0.2)

    def test_both_minimise_the_same_loss(self, script):
        A, (tokens, start, counts) = self.start(script)
        scaled = A / tokens.scale.float()[:, None]
        for which in ("top", "all"):
            counted = JointOptions(which).counted(3)
            Z, Y = [z.to_dense().float() for z in start.Z], [y.float() for y in start.Y]
            loop = script.AdamLoop(scaled, Z, Y, counted, 1e-2)
            first = loop.step()
            products = tokens.products(start.Y[0])
            expected = joint_loss(start, products, counted, tokens.squared_norm)
            assert first == pytest.approx(expected, rel=1e-3)
            losses = [loop.step() for _ in range(100)]
            assert losses[-1] < 0.9 * first
            assert all(bool((y >= 0).all()) for y in loop.Y)
            assert all(int((z != 0).sum(0).max()) <= counts[0] for z in loop.Z.values())
            joint = script.joint_curve(tokens, start, counts, which)
            assert len(joint.losses) == len(joint.clock) == len(joint.cores)
            assert min(joint.losses) < first

    def test_counts_what_it_says(self, script):
        adam = script.Curve([10.0, 6.0, 5.1, 5.0, 5.5], [0, 2, 4, 6, 8], [0, 4, 8, 12, 16])
        joint = script.Curve([7.0, 5.05, 4.5], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        found = script.compare(adam, joint)
        # Adam has its best after 6 s, the other is below it after 0.3 s; 95 % of the gain is a loss of 5.25.
        assert found["best"] == pytest.approx(20)
        assert found["best_cores"] == pytest.approx(40)
        assert found["near"] == pytest.approx(20)
        assert found["final"] == pytest.approx(0.9)
