"""How fast the planner searches, and how fast Calculon does the same search.

    python benchmarks/planner_speed.py
    python benchmarks/planner_speed.py --calculon path/to/calculon --limit-s 3600

Calculon (https://github.com/calculon-ai/calculon) is not on PyPI: give a checkout, with its requirements
(numpy, pandas, psutil) installed where this runs. Both search for the fastest way to train GPT-3 175B on 4,096 A100
with 1,536 sequences per step, in one process; its space is not ours (it has offloading, we have sharded weights,
context parallelism and zero-bubble schedules). CPU seconds, because machines are shared.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from colossus import zoo
from colossus.hardware.fleet_text import parse_fleet
from colossus.planner.plan import make_plan
from colossus.spec.goal import Goal

CASES = [
    ("gpt3-175b", "a100-80:4096", 300 * 10**9, 1536),
    ("llama3.1-405b", "colossus-200k", 15 * 10**12, None),
    ("grok-2", "colossus-200k", 15 * 10**12, None),
    ("deepseek-v3", "h800:2048", 15 * 10**12, None),
    ("llama3.1-8b", "h100:8", 10**11, None),
    ("gpt2", "laptop", 10**8, None),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calculon", type=Path, help="a checkout of Calculon")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="CPU seconds after which it is stopped")
    given = parser.parse_args()
    print("| model | fleet | candidates | that fit | CPU s, all of it | µs per candidate |")
    print("|---|---|---:|---:|---:|---:|")
    for model, fleet, tokens, sequences in CASES:
        start = time.process_time()
        planned = make_plan(
            zoo.find(model), parse_fleet(fleet), Goal(tokens=tokens, max_global_batch_sequences=sequences)
        )
        spent = time.process_time() - start
        print(
            f"| {model} | {fleet} | {planned.candidates:,} | {planned.feasible:,} | {spent:.2f} "
            f"| {spent / planned.candidates * 1e6:.3f} |",
            flush=True,
        )
    command = [sys.executable, "-c", "import runpy, sys; sys.argv = ['colossus', 'plan', 'spark', '--fleet', 'laptop', "
               "'--tokens', '10M', '--json']; runpy.run_module('colossus.cli', run_name='__main__')"]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\n`colossus plan spark --fleet laptop`, a fresh process: {time.perf_counter() - started:.2f} s wall, "
        f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.2f} CPU s"
    )
    if given.calculon is not None:
        calculon(given.calculon, given.limit_s)


def calculon(checkout: Path, limit_s: float) -> None:
    """Calculon's own search, in one process, stopped after `limit_s`."""
    output = Path("/tmp") / f"calculon-{os.getpid()}.json"
    command = [sys.executable, "./bin/calculon", "llm-optimal-execution", "models/gpt3-175B.json", "4096", "1536",
               "float16", "systems/a100_80g.json", str(output), "-c", "1"]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run(
            command, cwd=checkout, env={**os.environ, "PYTHONPATH": "."}, timeout=limit_s, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        outcome = "finished"
    except subprocess.TimeoutExpired:
        outcome = "not finished, stopped"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\nCalculon, `{' '.join(command[1:])}`: {outcome} after {spent:,.0f} CPU s")


if __name__ == "__main__":
    main()
