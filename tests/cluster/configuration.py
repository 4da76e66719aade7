"""What the test cluster is: two nodes of two CPUs that run, and machines with GPUs that can only be asked for."""

from __future__ import annotations

import secrets
from pathlib import Path

NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=guard
SlurmctldHost=head(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives, two minutes if nothing is said.
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
OverTimeLimit=0
KillWait=3
MinJobAge=86400
SlurmdTimeout=15
SlurmdParameters=config_overrides
GresTypes=gpu
# Machines that are powered down until a job needs them: what asks for them can be tested, and is never started.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
SuspendExcNodes=n[1-2]
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=a[1-64] CPUs=128 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=a100 Nodes=a[1-64] MaxTime=INFINITE State=UP OverSubscribe=NO
"""
GPUS = "NodeName=a[1-64] Name=gpu Count=8\n"


def write_configuration(folder: Path, port: int, ports: list[int]) -> None:
    """Write slurm.conf, gres.conf and munge's key into a folder, and make the folders that Slurm expects there.

    Args:
        folder: where the cluster has everything.
        port: of slurmctld.
        ports: of each node's slurmd.
    """
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, port=port, ports=ports))
    (folder / "gres.conf").write_text(GPUS)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
