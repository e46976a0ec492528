"""A real Slurm of one node on loopback, with its own keys, ports and folder: nothing of the machine is touched.

By hand: python tests/local_slurm.py FOLDER, and elsewhere export SLURM_CONF=FOLDER/slurm.conf; Ctrl-C stops it.
Needs Debian's slurm-wlm and munge.
"""

import contextlib
import getpass
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # where Debian puts the daemons

CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=3
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=1
{node} NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What has to be installed first."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Mapping[str, str]]:
    """Start the cluster; the environment in which its commands find it. All of it is gone afterwards."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(
        CONF.format(
            host=platform.node(),
            folder=folder,
            user=getpass.getuser(),
            ctld_port=free_port(),
            slurmd_port=free_port(),
            node=run("slurmd", "-C").splitlines()[0],
        )
    )
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    files = ("socket", "key-file", "log-file", "pid-file", "seed-file")
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in files]
    with contextlib.ExitStack() as stack:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-c"],
        ):
            stack.enter_context(daemon(command, environment, folder))
        wait_until_idle(environment, folder)
        yield environment
        run("scancel", "--user", getpass.getuser(), env=environment)


@contextlib.contextmanager
def daemon(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[None]:
    """A process in the foreground of a session of its own, ended afterwards with all that it started."""
    with (folder / f"{command[0]}.out").open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_idle(environment: Mapping[str, str], folder: Path, seconds: float = 60) -> None:
    """Until the node takes jobs. Raises RuntimeError with the daemons' logs if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = [*folder.glob("*.log"), *folder.glob("*.out")]
    raise RuntimeError("\n".join([done.stdout, done.stderr, *(path.read_text()[-2000:] for path in logs)]))


def run(*command: str, env: Mapping[str, str] | None = None) -> str:
    environment = env or {**os.environ, "PATH": PATH}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).resolve()):
        print("running; Ctrl-C stops it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
