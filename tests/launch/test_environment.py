"""The place of a process, as launchers write it."""

import pytest

from colossus.errors import ConfigError
from colossus.launch.environment import Place, first_host, place

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


def test_torch_variables() -> None:
    assert place(TORCH) == Place(rank=5, num_ranks=8, local_rank=1, address="gpu01", port=29500)


def test_what_is_written_is_what_is_read() -> None:
    there = Place(rank=3, num_ranks=4, local_rank=0, address="localhost", port=1)
    assert place(there.variables()) == there


def test_slurm_variables() -> None:
    assert place(SLURM) == Place(rank=9, num_ranks=16, local_rank=1, address="gpu003", port=24567)


def test_all_tasks_of_a_slurm_job_meet_at_one_port_and_those_of_another_job_do_not() -> None:
    found = {place({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(16)}
    assert len({one.port for one in found if one}) == 1
    other = place({**SLURM, "SLURM_JOB_ID": "1234568"})
    assert other is not None
    assert other.port not in {one.port for one in found if one}


def test_a_job_script_may_say_where_slurms_tasks_meet() -> None:
    found = place({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert found == Place(rank=9, num_ranks=16, local_rank=1, address="head", port=1234)


def test_torchrun_under_srun_counts_ranks_and_not_tasks() -> None:
    assert place({**SLURM, **TORCH}) == place(TORCH)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},
    ],
    ids=["shell", "only where to meet", "Slurm's job script"],
)
def test_a_process_by_itself_has_no_place(alone: dict[str, str]) -> None:
    assert place(alone) is None


@pytest.mark.parametrize("name", TORCH)
def test_a_missing_variable_is_named(name: str) -> None:
    rest = {key: value for key, value in TORCH.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name} is missing beside "):
        place(rest)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST"])
def test_a_missing_variable_of_slurm_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is missing beside "):
        place({key: value for key, value in SLURM.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "RANK=8 does not exist in a run of WORLD_SIZE=8: ranks count from 0 to 7"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' is not a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0: a run has at least one rank"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8 does not exist"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
    ],
)
def test_contradictions(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place({**TORCH, **changes})


def test_a_contradiction_names_slurms_own_variables() -> None:
    with pytest.raises(ConfigError, match="SLURM_PROCID=16 does not exist in a run of SLURM_NTASKS=16"):
        place({**SLURM, "SLURM_PROCID": "16"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[003-010,012],other7", "gpu003"),
        ("rack[2,5]-gpu[10-12]", "rack2-gpu10"),
        ("a[1-2].example.org", "a1.example.org"),
    ],
)
def test_the_first_host_of_a_nodelist(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "gpu[", ","])
def test_a_nodelist_without_a_host(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="Set MASTER_ADDR"):
        first_host(nodelist)
