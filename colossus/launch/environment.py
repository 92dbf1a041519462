"""Which rank is this process? Whoever started it has written that into its environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from colossus.errors import ConfigError

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a run, and where all of its ranks meet.

    `local_rank` counts the ranks of this machine from 0: the chip that is this rank's.
    """

    rank: int
    num_ranks: int
    local_rank: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The same as torch's `env://` reads it."""
        values = (self.rank, self.num_ranks, self.local_rank, self.address, self.port)
        return {name: str(value) for name, value in zip(_TORCH, values, strict=True)}


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, or None where it was started by itself.

    Torch's variables (`torchrun`, `colossus.launch.local`) go before Slurm's: under `srun torchrun` each of
    Slurm's tasks is a launcher of ranks, and its number is not a rank. MASTER_ADDR and MASTER_PORT alone say
    where ranks meet and not which one this is, so Slurm's tasks may have them from the job script.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _torch_place(environment)
    if "SLURM_PROCID" in environment and any(x in environment for x in ("SLURM_STEP_ID", "SLURM_STEPID")):
        return _slurm_place(environment)
    return None  # a job script itself has SLURM_PROCID=0, but no step: it is not one of srun's tasks


def _torch_place(environment: Mapping[str, str]) -> Place:
    _all_there(environment, _TORCH, "torchrun and colossus set all of these")
    return _checked(
        Place(
            rank=_number(environment, "RANK"),
            num_ranks=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            address=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT"),
        ),
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    )


def _slurm_place(environment: Mapping[str, str]) -> Place:
    needed = _SLURM if "MASTER_ADDR" not in environment else _SLURM[:-1]
    _all_there(environment, needed, "srun sets all of these")
    return _checked(
        Place(
            rank=_number(environment, "SLURM_PROCID"),
            num_ranks=_number(environment, "SLURM_NTASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_JOB_NODELIST"]),
            port=_number(environment, "MASTER_PORT")
            if "MASTER_PORT" in environment
            else _slurm_port(environment),
        ),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    )


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[003-010,012],other7` → `gpu003`."""
    host = re.sub(r"\[([^]\-,]*)[^]]*\]", r"\1", nodelist).split(",")[0].strip()
    if not host or set(host) & set("[]"):
        raise ConfigError(
            f"SLURM_JOB_NODELIST={nodelist!r} names no first host. Set MASTER_ADDR to the host of rank 0."
        )
    return host


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The same port in all tasks of one job, another in the next job; below those that systems give out."""
    job = _number(environment, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environment else 0
    return 20_000 + job % 10_000


def _all_there(environment: Mapping[str, str], names: tuple[str, ...], who: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        there = [f"{name}={environment[name]}" for name in names if environment.get(name)]
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing beside {', '.join(there)}: "
            f"which rank this process is cannot be told. {who[0].upper()}{who[1:]}; "
            f"to train with one process, unset them."
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"{name}={text!r} is not a whole number ≥ 0.")
    return int(text)


def _checked(found: Place, names: tuple[str, str, str]) -> Place:
    rank, num_ranks, local_rank = names
    if found.num_ranks < 1:
        raise ConfigError(f"{num_ranks}={found.num_ranks}: a run has at least one rank.")
    if found.rank >= found.num_ranks:
        raise ConfigError(
            f"{rank}={found.rank} does not exist in a run of {num_ranks}={found.num_ranks}: "
            f"ranks count from 0 to {found.num_ranks - 1}."
        )
    if found.local_rank >= found.num_ranks:
        raise ConfigError(
            f"{local_rank}={found.local_rank} does not exist in a run of {num_ranks}={found.num_ranks}: "
            f"no machine has more ranks than the run."
        )
    if not 0 < found.port < 2**16:
        raise ConfigError(f"MASTER_PORT={found.port} is not a port: ports go from 1 to 65535.")
    return found
