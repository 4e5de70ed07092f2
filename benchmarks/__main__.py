"""`python -m benchmarks`: one thread, CPU time; prints the table and writes report/bench.json."""

from __future__ import annotations

import json
import os
import sys

import torch

from benchmarks.cases import CASES, ROOT
from benchmarks.timing import Effort, Row

# What the Makefile exports, read when a process starts: one thread, and freed memory kept.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
EFFORT = Effort(rounds=11, seconds=0.15)


def report(rows: list[Row]) -> str:
    """The table, one line per figure."""
    lines = [f"{'':38}{'median':>10}{'min':>10}{'max':>10}  {'unit':<8}  wanted"]
    for row in rows:
        s = row.summary
        figures = "".join(f"{s[key]:>10.4g}" for key in ("median", "min", "max"))
        lines.append(f"{row.name:38}{figures}  {row.unit:<8}  {row.wanted}".rstrip())
    return "\n".join(lines)


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks"], {**os.environ, **ENVIRONMENT}
        )
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, CPU time, "
        f"{EFFORT.rounds} rounds in turn; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    )
    rows: list[Row] = []
    for case in CASES:
        print(f"{case.__name__} ...", end=" ", flush=True)
        rows.extend(case(EFFORT))
    print(f"\n\n{report(rows)}")
    path = ROOT / "report" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({row.name: row.summary for row in rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
