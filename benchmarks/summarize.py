"""Prints the ratios of a pytest-benchmark JSON file: each implementation against the baseline of its group.

python benchmarks/summarize.py benchmarks/results/latest.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

BASELINES = ("torch", "published")


def main(path: str) -> None:
    with open(path) as file:
        report = json.load(file)
    machine = report["machine_info"]
    print(f"{machine['cpu']['brand_raw']}, {machine['threads']} threads, torch {machine['torch']}\n")
    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for run in report["benchmarks"]:
        name = run["extra_info"]["backend"]
        # A test's parameters without the implementation name the group.
        parameters = (
            "-".join(part for part in run["param"].split("-") if part != name) if run["param"] else ""
        )
        groups[f"{run['name'].split('[')[0].removeprefix('test_')} {parameters}"][name] = run["stats"]
    print(f"| {'what':<58} | baseline | median ms | ours | median ms (quartiles) | ratio |")
    print("|---|---|---|---|---|---|")
    for group, by_name in groups.items():
        baseline = next(name for name in BASELINES if name in by_name)
        for name, stats in by_name.items():
            if name != baseline:
                base = 1e3 * by_name[baseline]["median"]
                median, q1, q3 = (1e3 * stats[key] for key in ("median", "q1", "q3"))
                cells = [f"{group:<58}", baseline, f"{base:.2f}", name, f"{median:.2f} ({q1:.2f}-{q3:.2f})"]
                print(f"| {' | '.join(cells)} | {base / median:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1])
