"""A rank's place in its job, from environment variables that people and launchers set."""

from __future__ import annotations

import pytest

from sdpg_megatron.errors import LaunchError
from sdpg_megatron.process.rank_environment import RankEnvironment

JOB = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, RankEnvironment()),
        ({"RANK": "", "WORLD_SIZE": ""}, RankEnvironment()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}, RankEnvironment(local_rank=2)),
        ({"WORLD_SIZE": "1"}, RankEnvironment()),
        (
            JOB | {"LOCAL_WORLD_SIZE": "2"},
            RankEnvironment(
                rank=1, world_size=4, local_rank=1, local_world_size=2, master_addr="10.0.0.1", master_port=29500
            ),
        ),
    ],
)
def test_what_is_read(environment: dict[str, str], expected: RankEnvironment) -> None:
    assert RankEnvironment.read(environment) == expected
    assert expected.is_main == (expected.rank == 0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.5", " 1", "$SLURM_PROCID", "¹"])
def test_what_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(
        LaunchError, match=rf"^{name}: found .*, expected a whole number of at least [01]\. Fix: .*srun"
    ):
        RankEnvironment.read({**JOB, name: text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, r"^RANK: found 4, expected a number below WORLD_SIZE \(4\)"),
        ({"WORLD_SIZE": "1"}, r"^RANK: found 1, expected a number below WORLD_SIZE \(1\)"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE: found '0', expected a whole number of at least 1"),
        ({"RANK": None}, "^RANK: found none, with WORLD_SIZE=4"),
        ({"WORLD_SIZE": None}, "^WORLD_SIZE: found none, with RANK=1"),
        ({"MASTER_ADDR": None}, "^MASTER_ADDR: found none, with WORLD_SIZE over 1"),
        ({"MASTER_PORT": ""}, "^MASTER_PORT: found none, with WORLD_SIZE over 1"),
        ({"MASTER_PORT": "0"}, "^MASTER_PORT: found '0', expected a whole number of at least 1"),
        ({"MASTER_PORT": "65536"}, "^MASTER_PORT: found 65536, expected a port from 1 to 65535"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(changes: dict[str, str | None], message: str) -> None:
    environment = {name: text for name, text in {**JOB, **changes}.items() if text is not None}
    with pytest.raises(LaunchError, match=message):
        RankEnvironment.read(environment)
    with pytest.raises(LaunchError):
        RankEnvironment.read(environment | SRUN)


def test_under_srun_the_fix_is_slurms() -> None:
    with pytest.raises(LaunchError, match=r"Fix: under srun: export RANK=\$SLURM_PROCID"):
        RankEnvironment.read({"WORLD_SIZE": "4", **SRUN})
    with pytest.raises(LaunchError, match="Fix: start the ranks with torchrun"):
        RankEnvironment.read({"WORLD_SIZE": "4"})
