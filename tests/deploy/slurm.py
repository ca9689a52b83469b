"""A Slurm cluster whose three nodes are this machine: its daemons, in a mount namespace that knows their names."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from baton.launch.local import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "unshare")
PATIENCE_S = 120.0
NODES = ("node1", "node2", "node3")  # one for each component of a job: Slurm gives them no node in common

CONFIG = """
ClusterName=pretended
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""

NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=16"


class SlurmCluster:
    """Its commands run in `run`. Raises OSError and SubprocessError where it cannot be."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        self._enter = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
        self._env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start_daemons()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the jobs, then the daemons: jobs would outlive them."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING")
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + PATIENCE_S
        while "JOB" in self.run("squeue", "--noheader", "--format=JOB") and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_daemons(self) -> None:
        controller_port, *ports = free_ports(1 + len(NODES))
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        host = os.uname().nodename
        nodes = "\n".join(NODE.format(name=name, port=port) for name, port in zip(NODES, ports, strict=True))
        config = CONFIG.format(folder=self.folder, host=host, controller_port=controller_port, nodes=nodes)
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = [f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log", "--foreground"]
        self._start("munged", "--force", *munge)
        self.wait_until((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self.wait_until(
            lambda: f"up {len(NODES)}" in self.run("sinfo", "-h", "-t", "idle", "-o", "%a %D"), "idle nodes"
        )
        return self

    def run(self, *command: str, **environ: str) -> str:
        env = {**self._env, **environ}
        done = subprocess.run([*self._enter, *command], env=env, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)

    def _start(self, program: str, *arguments: str) -> None:
        command = [*self._enter, program, *arguments]
        with (self.folder / f"{program}.out").open("ab") as log:
            daemon = subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(daemon)


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None and shutil.which(f"/usr/sbin/{name}") is None]
