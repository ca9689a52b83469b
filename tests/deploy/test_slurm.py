"""deploy/slurm/baton.sbatch, run by Slurm on three nodes that are this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from baton.launch.local import free_ports
from baton.node.secret_file import write_secret
from baton.tests.deploy.compose import FOLDER, ROOT
from baton.tests.deploy.slurm import SlurmCluster, missing_programs
from baton.tests.deploy.tools import skip

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

SCRIPT = FOLDER / "slurm" / "baton.sbatch"
BODY = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def slurm() -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        skip(f"Slurm is not here ({', '.join(missing)}): Debian's packages are slurmctld, slurmd and munge")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        skip("this machine lets no process have mounts of its own: a pretended Slurm cluster needs them")
    with SlurmCluster() as cluster:
        yield cluster


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


def test_a_job_of_three_components_serves_and_drains(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Guards the batch script: addresses across nodes, a worker that is started again, and the drain in order."""
    script, log, secret = tmp_path / "baton.sbatch", tmp_path / "job.log", tmp_path / "secret"
    script.write_text(SCRIPT.read_text().replace(" --gpus-per-task=1", ""))  # as its comment says for CPUs
    write_secret(secret)
    http_port, control_port = free_ports(2)
    environ = {
        "PYTHONPATH": str(ROOT / ".link"),
        "BATON_COMMAND": f"{sys.executable} -P -m baton",
        "BATON_SECRET_FILE": str(secret),
        "BATON_HTTP_PORT": str(http_port),
        "BATON_CONTROL_PORT": str(control_port),
        "BATON_DECODE_OPTIONS": "--kv-memory-gib 0.1",
    }
    submitted = slurm.run("sbatch", f"--output={log}", str(script), **environ)
    job = re.search(r"Submitted batch job (\d+)", submitted)
    assert job, submitted
    url = f"http://127.0.0.1:{http_port}"
    slurm.wait_until(lambda: status(f"{url}/ready") == 200, "the job serves")
    text = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()["choices"][0]["text"]

    worker = re.search(rf"worker_started worker=decode-{job[1]}-\d+/.*address=tcp://(node[123]):", log.read_text())
    assert worker, log.read_text()
    (process,) = subprocess.run(
        ["pgrep", "--full", "--", f"--worker-id=decode-{job[1]}-"], capture_output=True, text=True
    ).stdout.split()
    subprocess.run(["kill", "-KILL", process], check=True)
    slurm.wait_until(
        lambda: log.read_text().count("worker_started worker=decode-") == 2, "Slurm's task starts it again"
    )
    slurm.wait_until(lambda: status(f"{url}/ready") == 200, "the job serves again")
    assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()["choices"][0]["text"] == text

    slurm.run("scancel", "--batch", "--signal=TERM", job[1])
    slurm.wait_until(lambda: "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", job[1]), "the job has ended")
    ended = log.read_text()
    assert ended.rstrip().endswith("drained") and "worker_stopped role=decode" in ended
    assert re.search("ExitCode=0:0", slurm.run("scontrol", "show", "job", job[1]))
