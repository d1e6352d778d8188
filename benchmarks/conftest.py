"""pytest-benchmark settings: what a benchmark was measured on goes into its JSON."""

from __future__ import annotations

import torch

from snmf_kernels import _backends


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["snmf_kernels"] = _backends.compiled_module().build_info()
