"""A real Slurm of two nodes on this machine, on the loopback address only: for tests, and to try launchers by hand.

    python tests/slurm_cluster.py check           exits with 1 where it cannot be started, and says what is missing
    python tests/slurm_cluster.py start FOLDER    prints the SLURM_CONF to export
    python tests/slurm_cluster.py stop FOLDER

Needs Slurm's own programs (Debian: apt-get install --no-install-recommends slurm-wlm slurm-client munge), root, and no
other controller on the ports below. No systemd, no cgroups, no accounting.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
INSTALL = "apt-get install --no-install-recommends slurm-wlm slurm-client munge"
CONTROLLER_PORT, NODE_PORTS = 16817, {"n1": 17001, "n2": 17002}
CPUS_PER_NODE = 2

CONF = """
ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=600
KillWait=20
MaxArraySize={max_array_size}
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Slurm's programs that are not on this machine, and root when we are not that."""
    return [name for name in PROGRAMS if shutil.which(name) is None] + ([] if os.geteuid() == 0 else ["root"])


def write_conf(folder: Path, max_array_size: int) -> Path:
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} RealMemory=8000"
        for name, port in NODE_PORTS.items()
    )
    conf = folder / "slurm.conf"
    values = {"folder": folder, "host": host, "port": CONTROLLER_PORT, "max_array_size": max_array_size}
    conf.write_text(CONF.format(nodes=nodes, names=",".join(NODE_PORTS), **values))
    return conf


def start(folder: Path, max_array_size: int = 1001) -> Path:
    """Starts the daemons and returns the configuration that clients need as SLURM_CONF, with both nodes idle."""
    folder = folder.absolute()
    for name in ("state", *(f"spool/{node}" for node in NODE_PORTS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "key"
    if not key.exists():
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
    conf = write_conf(folder, max_array_size)
    run(conf, "munged", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--force")  # fmt: skip
    start_controller(conf)
    for node in NODE_PORTS:
        run(conf, "slurmd", "-N", node)
    wait_for(lambda: "idle" in (said := run(conf, "sinfo", "-h", "-o", "%T %D", check=False)) and "2" in said)
    return conf


def start_controller(conf: Path) -> None:
    run(conf, "slurmctld", "-i", *([] if any((conf.parent / "state").iterdir()) else ["-c"]))


def kill_controller(conf: Path) -> None:
    os.kill(int((conf.parent / "slurmctld.pid").read_text()), signal.SIGKILL)


def stop(folder: Path) -> None:
    """Cancels what runs and stops the daemons, the ones that are there."""
    conf = folder / "slurm.conf"
    run(conf, "scancel", "--user=root", check=False, timeout=20)
    time.sleep(1)
    for name in ("slurmctld", *(f"slurmd-{node}" for node in NODE_PORTS), "munged"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


def run(conf: Path, *command: str, check: bool = True, timeout: float = 60) -> str:
    """What one of Slurm's programs prints."""
    env = os.environ | {"SLURM_CONF": str(conf)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


def wait_for(condition, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"nothing after {limit_s} s"
        time.sleep(0.2)


def main(action: str = "", folder: str = "") -> None:
    if action not in ("check", "start", "stop") or bool(folder) != (action != "check"):
        sys.exit(__doc__)
    if action != "stop" and (lacking := missing()):
        sys.exit(f"missing: {', '.join(lacking)}; on Debian: {INSTALL}")
    if action == "start":
        print(f"export SLURM_CONF={start(Path(folder))}")
    elif action == "stop":
        stop(Path(folder).absolute())


if __name__ == "__main__":
    main(*sys.argv[1:3])
