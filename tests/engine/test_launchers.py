"""Which rank a process is under each launcher. Environments are those that the launchers set (slurm 23, Open MPI 4)."""

import pytest

from maskmatch_scale.engine.launchers import Place, first_host
from maskmatch_scale.engine.setup import gpu_of
from maskmatch_scale.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "3894411265",
}
MPIEXEC = {
    "PMI_SIZE": "2",
    "PMI_RANK": "0",
    "PMI_ID": "0",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "MASTER_PORT": "2345",
}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 0, 1, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 1, 4, 2)),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, (3, 3, 4, 4)),
        (SRUN, (5, 1, 8, 4)),
        (MPIRUN, (1, 1, 2, 2)),
        (MPIEXEC, (0, 0, 2, 2)),
        # torchrun within a slurm step: its own variables count.
        (SRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, (0, 0, 2, 2)),
        # A batch script, or a shell of salloc: one process, whatever the size of the job.
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, (0, 0, 1, 1)),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 0, 1, 1)),
    ],
)
def test_rank_and_size(env, place):
    found = Place.from_environment(env)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == place


def test_all_ranks_of_a_job_find_the_same_master_and_jobs_differ():
    places = [Place.from_environment(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert len({place.master for place in places}) == 1
    address, port = places[0].master
    assert address == "gpu007"
    assert 20_000 <= port < 40_000
    for other in ({"SLURM_JOB_ID": "4171"}, {"SLURM_STEP_ID": "1"}):  # two steps of a job may share a machine
        assert Place.from_environment(SRUN | other).master[1] != port
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert Place.from_environment(SRUN | given).master is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_NTASKS=8 is set, but SLURM_PROCID is not"),
        ({k: v for k, v in MPIRUN.items() if "LOCAL_RANK" not in k}, "OMPI_COMM_WORLD_LOCAL_RANK is not"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "does not say where rank 0 is; set MASTER_ADDR"),
        ({k: v for k, v in MPIRUN.items() if k != "PMIX_NAMESPACE"}, "set MASTER_PORT"),
        # PMI_ID is the rank: a port made from it would be another one for each.
        ({k: v for k, v in MPIEXEC.items() if k != "MASTER_PORT"}, "mpiexec has set nothing .* set MASTER_PORT"),
    ],
)
def test_a_launcher_that_says_too_little_is_refused(env, message):
    with pytest.raises(UserError, match=message):
        Place.from_environment(env)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("rack[3,5]-n1,x", "rack3-n1"),
        ("a-b[10]", "a-b10"),
    ],
)
def test_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_a_rank_takes_the_only_gpu_that_it_sees():
    assert [gpu_of(rank, visible=1) for rank in range(4)] == [0, 0, 0, 0]
    assert [gpu_of(rank, visible=4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: 2 are visible"):
        gpu_of(2, visible=2)
