"""From real text to batches: memory, time and throughput of preparation, and the time of one read.

    python benchmarks/data_path.py --megabytes 1024 --folder /tmp/data_path

Gathers distinct text files of this machine into JSON lines until there are enough, prepares them in a process
of its own, watches that process's peak memory, reads batches, and prints Markdown. Should the machine hold
too little text, what there is comes again with every ASCII letter moved on by one in the alphabet, then by
two, and so on.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from colossus.data import BatchReader, Corpus, RichProgress, heldout_windows, prepare
from colossus.spec.data import DataConfig, Source, TrainedTokenizer

FILE_BYTES = 100_000_000
LARGEST_DOCUMENT = 1 << 20
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def default_roots() -> list[Path]:
    """Where a machine usually keeps text: Python installations, headers, documentation."""
    roots = [
        Path(sysconfig.get_paths()["stdlib"]),
        Path(sysconfig.get_paths()["purelib"]),
        Path("/usr/share"),
        Path("/usr/include"),
        Path("/usr/lib"),
        Path("/usr/local"),
        Path(sys.base_prefix).parent,
    ]
    return [root for root in roots if root.is_dir()]


def texts_on_this_machine(roots: list[Path]) -> Iterator[str]:
    """Every distinct UTF-8 text file below `roots`, sorted by path; data files and empty ones left out."""
    import xxhash

    seen: set[bytes] = set()
    for root in roots:
        for path in sorted(root.rglob("*")):
            try:
                if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_DOCUMENT:
                    continue
                content = path.read_bytes()
                if b"\0" in content[:8192] or not content.strip():
                    continue
                key = xxhash.xxh3_128_digest(content)
                if key not in seen:
                    seen.add(key)
                    yield content.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def rotated(text: str, places: int) -> str:
    """`text` with ASCII letters moved on in the alphabet."""
    moved = LETTERS[places:] + LETTERS[:places]
    return text.translate(str.maketrans(LETTERS + LETTERS.upper(), moved + moved.upper()))


def gather(folder: Path, num_bytes: int, roots: list[Path]) -> tuple[int, int, int]:
    """Writes JSON lines into `folder` until they hold `num_bytes` of text: bytes, documents, rotations
    used."""
    folder.mkdir(parents=True)
    written = documents = rotation = 0
    out: TextIO | None = None
    while written < num_bytes:
        before = written
        for text in texts_on_this_machine(roots):
            if out is None or out.tell() > FILE_BYTES:
                if out is not None:
                    out.close()
                out = (folder / f"{written // FILE_BYTES:04}-{documents:08}.jsonl").open(
                    "w", encoding="utf-8"
                )
            text = rotated(text, rotation) if rotation else text
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            documents += 1
            if written >= num_bytes:
                break
        if written == before or rotation == 25:
            raise SystemExit("this machine holds too little text; name more folders with --roots")
        rotation += written < num_bytes
    if out is not None:
        out.close()
    return written, documents, rotation


def peak_bytes(process: int | str) -> int:
    """The kernel's record of a process's largest resident memory; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def prepare_in_subprocess(arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak bytes of one preparation."""
    command = [sys.executable, __file__, "--prepare", "--folder", str(arguments.folder)]
    command += ["--vocab-size", str(arguments.vocab_size)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    child = subprocess.Popen(command)
    peak = 0
    while child.poll() is None:
        peak = max(peak, peak_bytes(child.pid))
        time.sleep(0.05)
    wall = time.monotonic() - began
    if child.returncode:
        raise SystemExit(f"preparation failed with status {child.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = int((arguments.folder / "peak").read_text())
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, max(peak, own)


def prepare_here(arguments: argparse.Namespace) -> None:
    """The child's work."""
    config = DataConfig(
        sources=(Source(path=str(arguments.folder / "text")),),
        tokenizer=TrainedTokenizer(vocab_size=arguments.vocab_size),
    )
    with RichProgress(every_s=30) as progress:
        prepare(config, arguments.folder / "corpus", progress=progress)
    (arguments.folder / "peak").write_text(str(peak_bytes("self")))


def read_times(corpus: Corpus, sequences: int, context: int, steps: int) -> np.ndarray:
    """Seconds of each `read`, warm, at steps from all over the first epochs."""
    reader = BatchReader(corpus, seed=0, context_tokens=context, global_batch_sequences=sequences)
    times = []
    for step in range(0, 97 * steps, 97):
        began = time.perf_counter()
        reader.read(step)
        times.append(time.perf_counter() - began)
    return np.array(times)


def report(
    arguments: argparse.Namespace, gathered: tuple[int, int, int], cost: tuple[float, float, int]
) -> str:
    """The measurements as Markdown."""
    wall, cpu, peak = cost
    began = time.monotonic()
    corpus = Corpus.open(arguments.folder / "corpus")
    opened = time.monotonic() - began
    began = time.monotonic()
    corpus.verify()
    verified = time.monotonic() - began
    record = corpus.manifest.sources[0]
    small, large = read_times(corpus, 32, 256, 500), read_times(corpus, 256, 2048, 50)
    windows = heldout_windows(corpus, 1024)
    rows = [
        ("text", f"{gathered[0] / 1e6:,.0f} MB in {gathered[1]:,} documents ({gathered[2]} rotations)"),
        ("peak resident memory", f"{peak / 1e6:,.0f} MB"),
        ("wall", f"{wall:,.0f} s"),
        ("CPU", f"{cpu:,.0f} s"),
        (
            "throughput",
            f"{gathered[0] / 1e6 / wall:,.2f} MB/s, {gathered[0] / 1e6 / cpu:,.2f} MB per CPU-second",
        ),
        ("tokens", f"{corpus.train_tokens:,} training, {corpus.heldout_tokens:,} held out"),
        ("duplicates", f"{record.duplicates:,}; skipped {record.skipped}"),
        ("open / verify every hash", f"{opened * 1e3:.1f} ms / {verified:.1f} s"),
        (
            "read 32 × 256",
            f"median {np.median(small) * 1e3:.2f} ms, 99 % {np.quantile(small, 0.99) * 1e3:.2f} ms",
        ),
        ("read 256 × 2048", f"median {np.median(large) * 1e3:.2f} ms"),
        ("held out, ≤ 1M tokens", f"{windows.num_documents:,} documents, {windows.num_tokens:,} tokens"),
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return "\n".join(
        [machine, "", "| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument(
        "--folder", type=Path, required=True, help="a new folder; about three times the text's size"
    )
    parser.add_argument("--roots", type=Path, nargs="*", default=None)
    parser.add_argument("--keep", action="store_true", help="leave the folder for a closer look")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_here(arguments)
        return
    gathered = gather(
        arguments.folder / "text", arguments.megabytes * 1_000_000, arguments.roots or default_roots()
    )
    print(report(arguments, gathered, prepare_in_subprocess(arguments)))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
