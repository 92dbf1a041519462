"""First light: what a small model learns in a fixed number of CPU seconds on one core, ours and three peers.

    python benchmarks/first_light.py all --work DIR           # text, environments, peers' best, ours, report
    python benchmarks/first_light.py peers --tune --work DIR  # search each peer's settings again (an hour)
    python benchmarks/first_light.py peers --work DIR         # only rerun the best of each (peers/tuned.json)
    python benchmarks/first_light.py throughput --work DIR    # tokens per CPU second on one common model
    python benchmarks/first_light.py ours --work DIR          # our own recipe
    python benchmarks/first_light.py report --work DIR        # write the Markdown again from the results

How it is counted. The figure is held-out bits per UTF-8 byte. A run's budget is in CPU seconds of its process
since the process began. Imports, building the model and a warm load of compiled code count; preparing tokens,
the first (cold) compile and the evaluation do not. Each run is preceded by a short calibration of the same
settings, which also warms the compile cache. The steps that fit the budget follow from the start-up and the
steady step time of that calibration, and the learning-rate schedule ends with them. A run that lands more
than 4% off its budget is run again with the steps corrected by what it measured, at most twice; the run
closest to the budget counts.

Measurements of peers are remembered in WORK/runs.jsonl and not made twice: take a new folder to measure afresh.
Every process is pinned to one core (--core) with one thread. The driver needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS_DIR = HERE / "peers"
TUNED = PEERS_DIR / "tuned.json"

Settings = dict[str, Any]

CALIBRATION_STEPS = 24
TOLERANCE = 0.04  # of the CPU budget
MAX_TRIES = 3
TABLE_FIELDS = (
    "bpb",
    "train_cpu_s",
    "tokens",
    "steps",
    "steady_tokens_per_cpu_s",
    "overhead_cpu_s",
    "params",
)
TRIED_SHAPES = ["2x128", "3x128", "1x256", "4x192", "4x256", "8x256"]  # layers x width
FINALIST_MARGIN = 0.1  # bits per byte within which the second shape gets a full-budget run as well
CLEARLY_WORSE = 0.15  # bits per byte, between shapes in ranking runs
DEFAULT_VOCAB = 4096  # tokens
# One common model for the throughput part: 8 layers x 320 wide, 5 heads of 64, untied head, batch 8 x 256.
COMMON_MODEL: Settings = {
    "layers": 8,
    "width": 320,
    "heads": 5,
    "context": 256,
    "batch": 8,
    "tied": False,
    "vocab": DEFAULT_VOCAB,
    "fused": True,
}
THROUGHPUT_STEPS = 8  # two are warm-up, the last is left out
HELDOUT_SHARE = 0.05  # of documents, by content hash
TEXT_SUFFIXES = {".py", ".txt", ".rst", ".md"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Peer:
    """One competitor: its script, its environment and its starting settings."""

    name: str
    title: str
    script: str
    env: str
    defaults: Settings


PEERS = {
    peer.name: peer
    for peer in (
        Peer("nanogpt", "nanoGPT-style, plain torch", "nanogpt_style.py", "nanogpt", {"fused": True}),
        Peer("litgpt", "litgpt", "litgpt_peer.py", "litgpt", {}),
        Peer("transformers", "transformers.Trainer", "transformers_peer.py", "transformers", {"fused": True}),
    )
}


class BenchmarkError(Exception):
    """Something the person at the keyboard has to know; shown without a traceback."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{dt.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- text, environments, machine


def write_text(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl from the running Python's standard library.

    Source and prose files without tests and installed packages, exact duplicates dropped. A document is held
    out by its content hash, about one in twenty.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in TEXT_SUFFIXES or SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        part = "heldout" if int.from_bytes(digest, "big") / 2**64 < HELDOUT_SHARE else "train"
        parts[part].append(json.dumps({"text": text, "path": str(relative)}))
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    say(f"text from {root}: {len(parts['train'])} training and {len(parts['heldout'])} held-out documents")


def machine() -> dict[str, Any]:
    """The processor and its cores, memory and platform."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    flags = ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


class Bench:
    """Runs peers in their environments and remembers every result in WORK/runs.jsonl."""

    def __init__(
        self, work: Path, envs: Path, text: Path, core: int | None, tolerance: float = TOLERANCE
    ) -> None:
        self.tolerance = tolerance
        self.work, self.envs, self.text, self.core = work.resolve(), envs.resolve(), text.resolve(), core
        self.work.mkdir(parents=True, exist_ok=True)
        self.log = self.work / "runs.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        if self.log.exists():
            for line in self.log.read_text("utf-8").splitlines():
                record = json.loads(line)
                self.done[record["key"]] = record["result"]
        self.warm: set[str] = set()

    def python_of(self, peer: Peer) -> Path:
        """The peer's interpreter; makes its environment from the pinned requirements where there is none."""
        folder = self.envs / peer.env
        python = folder / "bin" / "python"
        if python.exists():
            return python
        say(f"making the environment of {peer.title} in {folder}")
        venv.EnvBuilder(with_pip=True).create(folder)
        pins = PEERS_DIR / f"requirements-{peer.env}.txt"
        outcome = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "-r", pins],
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise BenchmarkError(f"could not install {pins.name} for {peer.title}:\n{outcome.stderr[-1500:]}")
        return python

    def tokens(self, vocab: int) -> Settings:
        """Token files for a vocabulary size, prepared once; returns the job fields that name them."""
        for part in ("train", "heldout"):
            if not (self.text / f"{part}.jsonl").exists():
                raise BenchmarkError(f"{self.text} has no {part}.jsonl; leave --text out to have it written")
        stamp = hashlib.blake2b((self.text / "train.jsonl").read_bytes(), digest_size=4).hexdigest()
        folder = self.work / "tokens" / f"{stamp}-{vocab}"
        if not (folder / "meta.json").exists():
            say(f"training a {vocab}-token tokenizer")
            command = [self.python_of(PEERS["nanogpt"]), PEERS_DIR / "prepare_tokens.py", self.text, folder]
            outcome = subprocess.run(
                [*map(str, command), str(vocab)], capture_output=True, text=True, check=False
            )
            if outcome.returncode:
                raise BenchmarkError(f"preparing tokens failed:\n{outcome.stderr[-1500:]}")
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        return {
            "train": str(folder / "train.npy"),
            "heldout": str(folder / "heldout.npy"),
            "heldout_bytes": meta["heldout_bytes"],
        }

    def environment(self) -> dict[str, str]:
        """One thread everywhere, and a compile cache of this benchmark's own."""
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "HF_HUB_OFFLINE": "1",
        }

    def pinned(self, command: Iterable[Any]) -> list[str]:
        """The command on the chosen core."""
        prefix = (
            ["taskset", "-c", str(self.core)] if self.core is not None and shutil.which("taskset") else []
        )
        return [*prefix, *map(str, command)]

    def launch(self, peer: Peer, settings: Settings) -> dict[str, Any]:
        """One process of a peer; returns the JSON object it prints."""
        job = peer.defaults | settings
        job |= self.tokens(job.setdefault("vocab", DEFAULT_VOCAB))
        command = self.pinned([self.python_of(peer), PEERS_DIR / peer.script, json.dumps(job)])
        outcome = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=False, cwd=self.work
        )
        if outcome.returncode or not outcome.stdout.strip():
            raise BenchmarkError(f"{peer.title} failed with {job}:\n{outcome.stderr[-2000:]}")
        result = json.loads(outcome.stdout.strip().splitlines()[-1])
        for part in ("train", "heldout"):  # the folder is of no interest to a reader
            result["job"][part] = Path(result["job"][part]).name
        return result

    def remembered(self, peer: Peer, what: str, settings: Settings) -> tuple[str, dict[str, Any] | None]:
        """The key of a measurement and its result, where it was made before."""
        key = json.dumps([peer.name, what, settings], sort_keys=True)
        return key, self.done.get(key)

    def keep(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        """Remember a result."""
        self.done[key] = result
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"key": key, "result": result}) + "\n")
        return result

    def history(self, peer: Peer) -> list[dict[str, Any]]:
        """Every ranking and full-budget run of a peer, of this and earlier searches in the same folder."""
        rows = []
        for key, result in self.done.items():
            name, what, settings = json.loads(key)
            kind, _, budget = what.partition("-")
            if name == peer.name and kind in ("rank", "run"):
                row = {"kind": kind, "budget_cpu_s": float(budget), "settings": settings}
                rows.append(row | {field: result[field] for field in TABLE_FIELDS})
        return rows

    def calibrate(self, peer: Peer, settings: Settings) -> dict[str, Any]:
        """Start-up and steady step time of these settings, measured once per shape with a warm cache."""
        shape = {k: v for k, v in settings.items() if k not in ("lr", "seed", "weight_decay", "min_lr_ratio")}
        key, result = self.remembered(peer, "calibration", shape)
        if result is not None:
            return result
        job = shape | {"evaluate": False, "steps": CALIBRATION_STEPS}
        if settings.get("compile"):
            self.launch(peer, job | {"steps": 4})  # fills the compile cache; its time is not used
        return self.keep(key, self.launch(peer, job))

    def rank(self, peer: Peer, settings: Settings, budget: float) -> dict[str, Any]:
        """One run of as many steps as a quiet core fits into ``budget`` CPU seconds, for comparing settings.

        Counted by the calibration's faster steps, so that a busy neighbour does not decide what wins.
        """
        key, result = self.remembered(peer, f"rank-{budget:g}", settings)
        if result is not None:
            return result
        speed = self.calibrate(peer, settings)
        steps = self.steps_for(peer, settings, budget, speed["overhead_cpu_s"], speed["quiet_step_cpu_s"])
        result = self.launch(peer, settings | {"steps": steps})
        self.tell(peer, settings, budget, result)
        return self.keep(key, result)

    def run(self, peer: Peer, settings: Settings, budget: float) -> dict[str, Any]:
        """One run that spends ``budget`` CPU seconds; of up to three tries the closest to it counts."""
        key, result = self.remembered(peer, f"run-{budget:g}", settings)
        if result is not None:
            return result
        speed = self.calibrate(peer, settings)
        overhead, step_s = speed["overhead_cpu_s"], speed["step_cpu_s"]
        tries: list[dict[str, Any]] = []
        for _ in range(MAX_TRIES):
            steps = self.steps_for(peer, settings, budget, overhead, step_s)
            latest = self.launch(peer, settings | {"steps": steps})
            self.tell(peer, settings, budget, latest)
            tries.append(latest)
            if abs(latest["train_cpu_s"] / budget - 1) <= self.tolerance:
                break
            step_s = (latest["train_cpu_s"] - overhead) / steps
        closest = min(tries, key=lambda r: abs(r["train_cpu_s"] - budget))
        closest["tries_cpu_s"] = [r["train_cpu_s"] for r in tries]
        return self.keep(key, closest)

    def steps_for(self, peer: Peer, settings: Settings, budget: float, overhead: float, step: float) -> int:
        """Steps that fill a budget of CPU seconds."""
        steps = int((budget - overhead) / step)
        if steps < 10:
            raise BenchmarkError(
                f"{peer.title}: {budget:g} CPU-s hold only {max(steps, 0)} steps of {short(settings)} "
                f"({overhead:.1f} s besides the steps, {step:.2f} s a step)"
            )
        return steps

    def tell(self, peer: Peer, settings: Settings, budget: float, result: dict[str, Any]) -> None:
        """One line about a finished run."""
        say(
            f"  {peer.name} {budget:g} CPU-s {short(settings)}: {result['bpb']:.3f} bpb, "
            f"{result['tokens'] / 1e3:.0f}k tokens, {result['train_cpu_s']:.1f} CPU-s"
        )


def short(settings: Settings) -> str:
    """A run's settings in a few words."""
    s = {"layers": 3, "width": 128, "batch": 4, "context": 256, "vocab": DEFAULT_VOCAB, "lr": 3e-3} | settings
    words = [f"{s['layers']}x{s['width']}", f"batch {s['batch']}x{s['context']}", f"vocab {s['vocab']}"]
    words += [f"lr {s['lr']:g}", s.get("precision", "fp32"), "compiled" if s.get("compile") else "eager"]
    if "family" in s:
        words.append(s["family"])
    if "tied" in s:
        words.append("tied" if s["tied"] else "untied")
    if "weight_decay" in s:
        words.append(f"wd {s['weight_decay']:g}")
    if "seed" in s:
        words.append(f"seed {s['seed']}")
    return ", ".join(words)


# ---------------------------------------------------------------- tuning


def shape(layers: int, width: int) -> Settings:
    """A decoder shape with heads of 64."""
    return {"layers": layers, "width": width, "heads": max(1, width // 64)}


@dataclass
class Tuner:
    """Finds a peer's best settings: cheap runs to rank, then the full budget for the best few."""

    bench: Bench
    peer: Peer
    budget: float  # CPU seconds of the final figure
    short_budget: float  # CPU seconds of a ranking run
    shapes: list[Settings]
    like: Settings | None = None  # settings found for another peer, to start from

    def __post_init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self.modes: list[dict[str, Any]] = []

    def score(self, settings: Settings, settle: bool = False) -> float:
        """Bits per byte of a ranking run, or of a full-budget run; infinite where it cannot run at all."""
        budget = self.budget if settle else self.short_budget
        for row in self.table:
            if row["settings"] == settings and row["budget_cpu_s"] == budget:
                return row["bpb"] if row["bpb"] is not None else float("inf")
        row = {"budget_cpu_s": budget, "settings": settings, "bpb": None}
        self.table.append(row)
        try:
            result = (self.bench.run if settle else self.bench.rank)(self.peer, settings, budget)
        except BenchmarkError as error:
            say(f"  left out: {str(error)[-600:]}")
            row["failed"] = str(error).splitlines()[0]
            return float("inf")
        row["bpb"] = result["bpb"]
        return result["bpb"]

    def settled(self, settings: Settings) -> float:
        """Bits per byte at the full budget."""
        return self.score(settings, settle=True)

    def improve(self, best: Settings, changes: Iterable[Settings]) -> Settings:
        """Try the changes in order up to the first that helps; the better settings, changed or not."""
        for change in changes:
            if self.score(best | change) < self.score(best):
                return best | change
        return best

    def rank_shapes(self, start: Settings, shapes: list[Settings]) -> list[Settings]:
        """Shapes by their ranking runs, best first; growing stops where a larger one is clearly worse."""
        scores: list[tuple[float, int]] = []
        for i, candidate in enumerate(shapes):
            size = candidate["layers"] * candidate["width"] ** 2
            worse = [s for s, k in scores if shapes[k]["layers"] * shapes[k]["width"] ** 2 < size]
            if worse and worse[-1] > min(worse) + CLEARLY_WORSE:
                continue
            scores.append((self.score(start | candidate), i))
        return [shapes[i] for _, i in sorted(scores)]

    def fastest_mode(self, settings: Settings) -> Settings:
        """Precision and compilation that promise the most tokens in the full budget."""
        promise: dict[tuple[str, bool], float] = {}
        for precision in (self.like["precision"],) if self.like else ("fp32", "bf16"):
            for compiled in (False, True):
                mode = {"precision": precision, "compile": compiled}
                try:
                    speed = self.bench.calibrate(self.peer, settings | mode)
                except BenchmarkError as error:
                    say(f"  left out: {str(error)[-600:]}")
                    continue
                left = self.budget - speed["overhead_cpu_s"]
                promise[precision, compiled] = left * speed["steady_tokens_per_cpu_s"]
                say(
                    f"  {self.peer.name} {precision} {'compiled' if compiled else 'eager'}: "
                    f"{speed['steady_tokens_per_cpu_s']:.0f} tokens/CPU-s, "
                    f"{speed['overhead_cpu_s']:.1f} CPU-s besides the steps"
                )
                self.modes.append(
                    {
                        "settings": settings | mode,
                        "tokens_per_cpu_s": speed["steady_tokens_per_cpu_s"],
                        "overhead_cpu_s": speed["overhead_cpu_s"],
                    }
                )
        precision, compiled = max(promise, key=lambda mode: promise[mode])
        return {"precision": precision, "compile": compiled}

    def tune(self) -> dict[str, Any]:
        """Rank in eager mode at the short budget, then settle at the full budget in the fastest mode.

        Ranking runs are eager because every new shape costs a minute of cold compiling; compiling speeds all
        shapes up by a similar factor, so their order stands.
        """
        say(f"tuning {self.peer.title}")
        base = {**shape(3, 128), "batch": 4, "context": 256, "vocab": DEFAULT_VOCAB, "lr": 3e-3}
        base |= {"tied": True, "seed": 0}
        if self.like:
            base |= {name: self.like[name] for name in ("batch", "context", "vocab", "lr", "tied")}
        if self.peer.name == "transformers":
            base["family"] = "llama"
        mode = self.fastest_mode(base)
        start = base | {"precision": mode["precision"], "compile": False}
        ranked = self.rank_shapes(start, self.shapes)
        best = start | ranked[0]
        if not self.like:
            best = self.improve(best, [{"lr": 6e-3}, {"lr": 1e-3}])
        best = self.improve(best, [{"lr": best["lr"] * 1.7}, {"lr": best["lr"] / 1.7}])
        if self.peer.name == "transformers":
            best = self.improve(best, [{"family": "gpt2"}])
        best = self.improve(best, [{"tied": not best["tied"]}])
        if not self.like:
            best = self.improve(best, [{"batch": 2}, {"batch": 8, "context": 128}])
            best = self.improve(best, [{"vocab": 2048}, {"vocab": 8192}])
        # At the full budget, in the fastest mode: the best shapes, then the learning rate of the better one.
        lowest = self.score(start | ranked[0])
        close = [c for c in ranked[:2] if self.score(start | c) <= lowest + FINALIST_MARGIN]
        winner = min((best | candidate | mode for candidate in close), key=self.settled)
        for change in () if self.like else ({"lr": winner["lr"] * 1.6}, {"lr": winner["lr"] * 0.6}):
            if self.settled(winner | change) < self.settled(winner):
                winner |= change
                break
        return {
            "settings": winner,
            "bpb": self.settled(winner),
            "budget_cpu_s": self.budget,
            "modes": self.modes,
            "table": self.bench.history(self.peer),
        }


def tune_peers(bench: Bench, args: argparse.Namespace) -> None:
    """Search settings for the chosen peers and write benchmarks/peers/tuned.json after each."""
    if args.like is not None:
        needed = {"batch", "context", "vocab", "lr", "tied", "precision"}
        if not isinstance(args.like, dict) or needed - set(args.like):
            raise BenchmarkError(f"--like has to be a JSON object with all of: {', '.join(sorted(needed))}")
    known = json.loads(TUNED.read_text("utf-8")) if TUNED.exists() else {"peers": {}}
    for name in args.only:
        found = Tuner(bench, PEERS[name], args.budget, args.short_budget, args.shapes, args.like).tune()
        found["date"] = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
        found["machine"] = machine()
        found["method"] = {
            "ranked": f"{args.short_budget:g} CPU-s each, eager",
            "settled": f"{args.budget:g} CPU-s, in the mode that promised the most tokens",
            "tolerance": args.tolerance,
            "around": args.like,
        }
        known["peers"][name] = found
        TUNED.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        say(f"{name}: best is {short(found['settings'])}")


def settings_text(settings: Settings) -> str:
    """A run's settings without its seed."""
    return short({name: value for name, value in settings.items() if name != "seed"})


def spread(values: list[float]) -> dict[str, Any]:
    """Median, range and the values themselves."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "values": values,
    }


# ---------------------------------------------------------------- the parts of the benchmark


def measure_peers(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The tuned settings of each peer over the seeds."""
    if not TUNED.exists():
        raise BenchmarkError(f"{TUNED} is missing; run with --tune first")
    tuned = json.loads(TUNED.read_text("utf-8"))["peers"]
    results: dict[str, Any] = {}
    for name in args.only:
        if name not in tuned:
            raise BenchmarkError(f"{TUNED.name} has no settings for {name}; run: peers --tune --only {name}")
        settings = tuned[name]["settings"]
        runs = [bench.run(PEERS[name], settings | {"seed": seed}, args.budget) for seed in range(args.seeds)]
        results[name] = {
            "settings": settings,
            "budget_cpu_s": args.budget,
            "bpb": spread([run["bpb"] for run in runs]),
            "train_cpu_s": spread([run["train_cpu_s"] for run in runs]),
            "runs": runs,
        }
    return results


def measure_throughput(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Steady tokens per CPU second of every peer on the common model, eager and compiled, fp32 and bf16."""
    results: dict[str, Any] = {}
    for name in args.only:
        results[name] = {}
        for precision in ("fp32", "bf16"):
            for compiled in (False, True):
                mode = {"precision": precision, "compile": compiled, "measure_peak": True, "evaluate": False}
                settings = COMMON_MODEL | mode | {"steps": THROUGHPUT_STEPS}
                label = f"{precision} {'compiled' if compiled else 'eager'}"
                key, result = bench.remembered(PEERS[name], "throughput", settings)
                try:
                    result = result or bench.keep(key, bench.launch(PEERS[name], settings))
                except BenchmarkError as error:
                    say(f"  left out: {str(error)[-600:]}")
                    results[name][label] = {"failed": str(error).splitlines()[0]}
                    continue
                say(
                    f"  {name} {label}: {result['steady_tokens_per_cpu_s']:.0f} tokens/CPU-s, "
                    f"{result['mfu_of_own_precision_peak']:.0%} of the measured {precision} peak"
                )
                results[name][label] = result
    return results


def command_of(template: str, **values: Any) -> list[str]:
    """A command line from a template with {names}; every word is filled in after splitting."""
    try:
        return [word.format(**values) for word in shlex.split(template)]
    except KeyError as error:
        raise BenchmarkError(
            f"the command {template!r} uses {error}, known are: {', '.join(values)}"
        ) from None


def measure_ours(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Our own recipe, by the command a user would type, once per seed; the JSON object it prints."""
    runs = []
    for seed in range(args.seeds):
        folder = bench.work / "ours" / f"{dt.datetime.now():%Y%m%d-%H%M%S}-{seed}"
        command = command_of(
            args.ours_command,
            colossus=args.colossus,
            train=bench.text / "train.jsonl",
            heldout=bench.text / "heldout.jsonl",
            cpu_seconds=f"{args.ours_budget:g}",
            runs=folder,
            seed=seed,
        )
        say(f"ours: {shlex.join(command)}")
        if not shutil.which(command[0]):
            raise BenchmarkError(
                f"there is no command {command[0]!r}; install this package, or give --colossus"
            )
        before = children_cpu_s()
        outcome = subprocess.run(
            bench.pinned(command), env=bench.environment(), capture_output=True, text=True, check=False
        )
        whole = children_cpu_s() - before
        if outcome.returncode:
            raise BenchmarkError(f"our own run failed ({outcome.returncode}):\n{outcome.stderr[-2000:]}")
        try:
            result = json.loads(outcome.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            result = parse_last_object(outcome.stdout)
        if "heldout_bits_per_byte" not in result:
            raise BenchmarkError(f"our own run printed no heldout_bits_per_byte: {result}")
        # All it used, preparing tokens, the cold compile, evaluation and saving included.
        result["whole_process_cpu_s"] = whole
        result["bpb"] = heldout_bits(bench, args.ours_python, Path(result["run_dir"]))
        runs.append(result)
        say(f"  ours: {result['bpb']:.3f} bpb in {result['cpu_s']:.1f} CPU-s (all told {whole:.1f})")
    return {
        "command": args.ours_command,
        "budget_cpu_s": args.ours_budget,
        "bpb": spread([run["bpb"] for run in runs]),
        "train_cpu_s": spread([run["cpu_s"] for run in runs]),
        "runs": runs,
    }


def children_cpu_s() -> float:
    """CPU seconds of all finished child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def our_script(bench: Bench, python: str, name: str, *words: Any) -> dict[str, Any]:
    """The JSON object one of our own benchmark scripts prints, run by the interpreter that has our package."""
    outcome = subprocess.run(
        bench.pinned([python, HERE / name, *words]),
        env=bench.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode:
        raise BenchmarkError(f"{name} failed ({outcome.returncode}):\n{outcome.stderr[-2000:]}")
    return json.loads(outcome.stdout.strip().splitlines()[-1])


def heldout_bits(bench: Bench, python: str, run: Path) -> float:
    """Bits per byte of our run on the very documents the peers are measured on, outside its counted time."""
    if not run.is_dir():
        raise BenchmarkError(f"our run left no folder {run} to evaluate")
    return our_script(bench, python, "heldout_bits.py", run, bench.text / "heldout.jsonl")["bpb"]


def our_throughput(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Our own steady throughput on the common model, in the fields of the peers' figures."""
    modes: dict[str, Any] = {}
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        for compiled in (False, True):
            label = f"{precision} {'compiled' if compiled else 'eager'}"
            words = ["--dtype", dtype, *([] if compiled else ["--eager"])]
            try:
                result = our_script(bench, args.ours_python, "ours_throughput.py", *words)
            except BenchmarkError as error:
                say(f"  left out: {str(error)[-600:]}")
                modes[label] = {"failed": str(error).splitlines()[0]}
                continue
            say(f"  ours {label}: {result['tokens_per_cpu_s']:.0f} tokens/CPU-s")
            modes[label] = result | {
                "steady_tokens_per_cpu_s": result["tokens_per_cpu_s"],
                "flops_6n": result["six_n_share_of_peak"] * result["peak_flops"],
                "mfu_of_own_precision_peak": result["six_n_share_of_peak"],
            }
    return modes


def parse_last_object(text: str) -> dict[str, Any]:
    """The JSON object a command printed over several lines at the end of its output."""
    decoder = json.JSONDecoder()
    for at in (i for i, c in enumerate(text) if c == "{" and (i == 0 or text[i - 1] == "\n")):
        with contextlib.suppress(json.JSONDecodeError):
            value, end = decoder.raw_decode(text, at)
            if not text[end:].strip():
                return value
    raise BenchmarkError(f"the command printed no JSON object: {text[-500:]!r}")


# ---------------------------------------------------------------- report


def render(results: dict[str, Any]) -> str:
    """The readable report."""
    m = results["machine"]
    lines = [
        "# First light",
        "",
        f"{results['date']}. {m['cpu']}, {m['cores']} cores ({', '.join(m['instructions']) or 'no AVX'}), "
        f"{m['memory_bytes'] / 2**30:.0f} GiB, {m['platform']}, Python {m['python']}. One core, one thread.",
        "",
        f"Command: `{results['command']}`",
        "",
        "Budgets are CPU seconds of the process since its start: imports and a warm load of compiled code "
        "count; preparing tokens, the cold compile and the evaluation do not. Figures are held-out bits per "
        "UTF-8 byte (lower is better), the median over seeds with the range.",
        "",
    ]
    rows = []
    for name, entry in results.get("peers", {}).items():
        run = entry["runs"][0]
        rows.append(
            f"| {PEERS[name].title} | {ranged(entry['bpb'])} | {entry['train_cpu_s']['median']:.1f} | "
            f"{run['tokens'] / 1e3:.0f}k | {run['params'] / 1e6:.2f} M | "
            f"{run['steady_tokens_per_cpu_s']:.0f} | {settings_text(entry['settings'])} | {len(entry['runs'])} |"
        )
    if ours := results.get("ours"):
        run = ours["runs"][0]
        rows.append(
            f"| Colossus | {ranged(ours['bpb'])} | {ours['train_cpu_s']['median']:.1f} | "
            f"{run['tokens'] / 1e3:.0f}k | {run['num_params'] / 1e6:.2f} M | "
            f"{run['tokens'] / run['cpu_s']:.0f} | first-light recipe | {len(ours['runs'])} |"
        )
    if rows:
        head = ["", "bits per byte", "CPU-s", "tokens", "parameters", "tokens/CPU-s", "settings", "seeds"]
        lines += ["## Learned per CPU second", "", table_row(head), table_row(["---"] * len(head)), *rows, ""]
        lines += [
            "Tokens per CPU second are steady-state for the peers and over the whole run for Colossus.",
            "",
        ]
    if ours and results.get("peers"):
        best = min(entry["bpb"]["median"] for entry in results["peers"].values())
        verdict = "below" if ours["bpb"]["high"] < best else "not below"
        lines += [
            f"Colossus after {ours['budget_cpu_s']:g} CPU-s is {verdict} the best peer's median, {best:.3f}.",
            "",
        ]
    if throughput := results.get("throughput"):
        lines += throughput_lines(throughput)
    versions = sorted(
        {
            f"{package} {number}"
            for entry in results.get("peers", {}).values()
            for run in entry["runs"]
            for package, number in run["versions"].items()
        }
    )
    if versions:
        lines += ["## Versions", "", ", ".join(versions), ""]
    lines += ["## What went badly", "", *(f"- {note}" for note in notes(results)), ""]
    return "\n".join(lines)


def throughput_lines(throughput: dict[str, Any]) -> list[str]:
    """The throughput table."""
    head = ["", "mode", "tokens/CPU-s", "6N GFLOP/s", "matmul peak GFLOP/s", "MFU", "start-up CPU-s"]
    lines = [
        "## Throughput on one model",
        "",
        f"{COMMON_MODEL['layers']} layers x {COMMON_MODEL['width']} wide, "
        f"{COMMON_MODEL['heads']} heads of 64, vocabulary {COMMON_MODEL['vocab']}, untied head, "
        f"batch {COMMON_MODEL['batch']} x {COMMON_MODEL['context']}; the median step, "
        "optimizer included. N counts the parameters in matrix products (blocks and head, not the embedding "
        "lookup), without attention's own products. MFU is against the matmul peak of the same precision, "
        "measured in the same process.",
        "",
        table_row(head),
        table_row(["---"] * len(head)),
    ]
    for name, modes in throughput.items():
        for label, r in modes.items():
            if "failed" in r:
                lines.append(table_row([title_of(name), label, "failed", "", "", "", ""]))
                continue
            peak = r["peak_flops"] if name == "ours" else r["matmul_peak_flops"][r["job"]["precision"]]
            begun = r.get("first_step_at_cpu_s")
            lines.append(
                table_row(
                    [
                        title_of(name),
                        label,
                        f"{r['steady_tokens_per_cpu_s']:.0f}",
                        f"{r['flops_6n'] / 1e9:.1f}",
                        f"{peak / 1e9:.0f}",
                        f"{r['mfu_of_own_precision_peak']:.1%}",
                        "" if begun is None else f"{begun:.1f}",
                    ]
                )
            )
    return [*lines, ""]


def title_of(name: str) -> str:
    """A competitor's name in the report."""
    return "Colossus" if name == "ours" else PEERS[name].title


def table_row(cells: list[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def ranged(value: dict[str, Any]) -> str:
    """Median with its range."""
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def notes(results: dict[str, Any]) -> list[str]:
    """What the reader has to know against these figures."""
    found = []
    for name, entry in results.get("peers", {}).items():
        off = max(abs(v / entry["budget_cpu_s"] - 1) for v in entry["train_cpu_s"]["values"])
        if off > TOLERANCE:
            found.append(f"{PEERS[name].title}: a run landed {off:.0%} off its CPU budget.")
    for name, modes in results.get("throughput", {}).items():
        found += [f"{title_of(name)}, {mode}: {r['failed']}" for mode, r in modes.items() if "failed" in r]
    load = results["machine"]["load_average"]
    if load and load[0] > 1.5:
        found.append(f"The machine was shared while this ran (load {load[0]:.1f}): CPU time carries noise.")
    if results.get("peers"):
        found.append(
            "A busy neighbour slows a core's CPU seconds too: a run's steps are fixed beforehand, so it may land "
            "off its budget. The CPU-s column says where it landed."
        )
    if "ours" in results:
        found.append(
            "Colossus's tokenizer and shape are its own; its figure is over the same held-out documents."
        )
        whole = statistics.median(run["whole_process_cpu_s"] for run in results["ours"]["runs"])
        found.append(
            f"Colossus's CPU-s are its own count; its process used {whole:.1f} all told, with preparing tokens, "
            "compiling, evaluation and saving."
        )
    found.append("The seeds are few; the ranges are of those seeds, no confidence intervals.")
    return found


# ---------------------------------------------------------------- command line


def parse_shape(text: str) -> Settings:
    """A shape written as LAYERSxWIDTH."""
    try:
        layers, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYERSxWIDTH, for example 3x128") from None
    if layers < 1 or width % 64:
        raise argparse.ArgumentTypeError(f"{text!r}: the width has to be a multiple of 64")
    return shape(layers, width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("part", choices=["peers", "ours", "throughput", "all", "report"])
    top.add_argument("--work", type=Path, default=Path("first-light-work"), help="tokens, runs and results")
    top.add_argument("--envs", type=Path, help="the peers' environments (default: WORK/envs)")
    top.add_argument(
        "--text", type=Path, help="folder with train.jsonl and heldout.jsonl (default: WORK/text)"
    )
    top.add_argument("--out", type=Path, help="where result.json and report.md go (default: WORK)")
    top.add_argument("--core", type=int, default=0, help="core to pin to; -1 leaves it open")
    top.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="some peers only")
    top.add_argument("--tune", action="store_true", help="search the peers' settings first")
    top.add_argument(
        "--like",
        type=json.loads,
        metavar="JSON",
        help="tune by a shorter search around these settings: batch, context, vocab, lr, tied, precision",
    )
    top.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=[parse_shape(text) for text in TRIED_SHAPES],
        help="shapes to try when tuning, as LAYERSxWIDTH, small to large",
    )
    top.add_argument("--budget", type=float, default=75.0, help="CPU seconds of a peer's run")
    top.add_argument("--short-budget", type=float, default=20.0, help="CPU seconds of a ranking run")
    top.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="share of the budget a run may miss it by"
    )
    top.add_argument("--seeds", type=int, default=2, help="runs per final figure")
    top.add_argument("--colossus", default="colossus", help="our command")
    top.add_argument(
        "--ours-python", default=sys.executable, help="interpreter that has our package (default: this one)"
    )
    top.add_argument("--no-ours", action="store_true", help="throughput of the peers only")
    top.add_argument("--ours-budget", type=float, default=25.0, help="CPU seconds of our run")
    top.add_argument(
        "--ours-command",
        default="{colossus} train first-light --data {train} --cpu-seconds {cpu_seconds} "
        "--seed {seed} --json --runs {runs}",
        help="how to run ours; knows {colossus} {train} {heldout} {cpu_seconds} {runs} {seed}",
    )
    return top


def main() -> int:
    """Run the chosen parts; results accumulate in result.json."""
    args = parser().parse_args()
    text = args.text or args.work / "text"
    core = None if args.core < 0 else args.core
    bench = Bench(args.work, args.envs or args.work / "envs", text, core, args.tolerance)
    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    result_file = out / "result.json"
    results = json.loads(result_file.read_text("utf-8")) if result_file.exists() else {}
    try:
        if args.text is None and not (text / "train.jsonl").exists():
            write_text(text)
        if args.part != "report":
            results |= {
                "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
                "machine": machine(),
                "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
            }
        if args.part in ("peers", "all"):
            if args.tune:
                tune_peers(bench, args)
            results["peers"] = results.get("peers", {}) | measure_peers(bench, args)
        if args.part in ("throughput", "all"):
            results["throughput"] = results.get("throughput", {}) | measure_throughput(bench, args)
            if not args.no_ours:
                results["throughput"]["ours"] = our_throughput(bench, args)
        if args.part in ("ours", "all"):
            results["ours"] = measure_ours(bench, args)
        if "machine" not in results:
            raise BenchmarkError(f"{result_file} holds no results yet; run a part first")
    except BenchmarkError as error:
        print(f"first light: {error}", file=sys.stderr)
        return 1
    finally:
        if "machine" in results:
            result_file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (out / "report.md").write_text(render(results), "utf-8")
    print(render(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
