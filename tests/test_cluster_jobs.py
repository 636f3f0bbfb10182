"""The jobs of experiments/cluster, each read by a parser of its kind, and run where that needs no cluster.

`tests/cluster/jobset_v1alpha2.json` is the schema that the JobSet controller publishes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sharding.processes import explicit

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "experiments" / "cluster"
SLURM = CLUSTER / "slurm.sh"
MANIFESTS = ("jobset.yaml", "jobset_gpu.yaml")


# ---- Slurm


def test_slurm_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def sbatch(script: Path, folder: Path) -> str:
    """What the real sbatch says about a script when there is no controller to hand it to."""
    config = folder / "slurm.conf"
    # A port where nobody listens.
    config.write_text(
        "ClusterName=none\nGresTypes=gpu\nSlurmctldHost=localhost\nSlurmctldPort=9\nAuthType=auth/none\nMessageTimeout=2\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    done = subprocess.run(
        ["sbatch", "--test-only", script], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stderr


@pytest.mark.skipif(not shutil.which("sbatch"), reason="sbatch is not installed: apt-get install slurm-client")
def test_sbatch_understands_every_option(tmp_path: Path) -> None:
    understood = "Unable to contact slurm controller"
    assert understood in sbatch(SLURM, tmp_path)
    # It reads each of the options: none may be changed to nonsense without its notice.
    text = SLURM.read_text()
    for planted in ("--nodes=four", "--frobnicate", "--signal=NONSENSE@300", "--time=tomorrowish"):
        wrong = tmp_path / "wrong.sh"
        wrong.write_text(text.replace("#SBATCH --requeue", f"#SBATCH {planted}"))
        assert understood not in sbatch(wrong, tmp_path), planted


def run_slurm(folder: Path, statuses: list[int], *arguments: str) -> tuple[int, list[str]]:
    """The script with stand-ins for Slurm's commands: the n-th srun ends with the n-th status; (status, calls).

    Before it ends with 143, Slurm sends SIGTERM to the script, as near the time limit.
    """
    log, count = folder / "calls", folder / "count"
    for name in ("srun", "scontrol", "scancel"):
        stand_in = folder / name
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\n')
        stand_in.chmod(0o755)
    choices = " ".join(map(str, statuses))
    with (folder / "srun").open("a") as file:
        file.write(f"statuses=({choices})\nn=$(cat {count} 2>/dev/null || echo 0)\necho $((n + 1)) > {count}\n")
        file.write('status=${statuses[$n]}\n[ "$status" != 143 ] || kill -TERM $PPID\nexit "$status"\n')
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "RESTARTS": "3"}
    done = subprocess.run(["bash", SLURM, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


SRUN = "srun --kill-on-bad-exit=1 --label mindjax run --config=x.py --workdir=/w a b"


@pytest.mark.parametrize(
    ("statuses", "status", "calls"),
    [
        ([0], 0, [SRUN]),
        ([134, 1, 0], 0, [SRUN] * 3),  # after a failure it goes on from the checkpoint
        ([9] * 9, 9, [SRUN] * 4),  # but not for ever
        ([2, 0], 2, [SRUN]),  # a mistake stays one
        ([143, 0], 0, [SRUN, "scancel --signal=TERM 77", "scontrol requeue 77"]),  # the time limit came
        ([1, 143], 0, [SRUN, SRUN, "scancel --signal=TERM 77", "scontrol requeue 77"]),
    ],
)
def test_slurm_script_restarts_and_requeues(tmp_path: Path, statuses: list[int], status: int, calls: list[str]) -> None:
    assert run_slurm(tmp_path, statuses, "--config=x.py", "--workdir=/w", "a b") == (status, calls)


def test_slurm_script_without_a_config_starts_nothing(tmp_path: Path) -> None:
    assert run_slurm(tmp_path, [0]) == (2, [])


# ---- Kubernetes


def strict(schema: Any) -> Any:
    """A field that the schema does not name is an error, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def problems(manifest: Any) -> list[str]:
    schema = strict(json.loads((ROOT / "tests" / "cluster" / "jobset_v1alpha2.json").read_text()))
    # The schema leaves metadata open: it is Kubernetes' own.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def pods(manifest: Any) -> Any:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_fits_the_published_schema(name: str) -> None:
    manifest = yaml.safe_load((CLUSTER / name).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert problems(manifest) == []
    # The schema does look: at its own fields, and deep down in those of Kubernetes.
    planted = yaml.safe_load((CLUSTER / name).read_text())
    planted["spec"]["failurePolicy"]["maxRestart"] = 3
    pods(planted)["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountpath"] = "/x"
    pods(planted)["completions"] = "16"
    assert len(problems(planted)) == 3


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_gives_every_process_what_it_joins_with(name: str) -> None:
    manifest = yaml.safe_load((CLUSTER / name).read_text())
    job = pods(manifest)
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    # What the controllers write into a pod, and what of it the manifest asks for.
    (own,), target = manifest["spec"]["replicatedJobs"], manifest["spec"]["coordinator"]
    assert target["replicatedJob"] == own["name"]
    host = f"{manifest['metadata']['name']}-{own['name']}-{target['jobIndex']}-{target['podIndex']}"
    annotations = {
        "jobset.sigs.k8s.io/coordinator": f"{host}.{manifest['metadata']['name']}",
        "batch.kubernetes.io/job-completion-index": "2",
    }
    environment: dict[str, str] = {}
    for key, variable in variables.items():
        if "value" in variable:
            value = variable["value"]
            for known in environment:  # a variable may use those before it
                value = value.replace(f"$({known})", environment[known])
            environment[key] = value
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            environment[key] = annotations[path.removeprefix("metadata.annotations['").removesuffix("']")]
    found = explicit(None, None, None, environment)
    assert found is not None
    assert found["coordinator_address"] == f"{host}.mindjax-sft:8476"
    assert (found["num_processes"], found["process_id"]) == (job["completions"] * own["replicas"], 2)
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert container["ports"] == [{"containerPort": 8476}]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert any(argument.startswith("--workdir=/shared/") for argument in container["command"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_runs_a_command_that_mindjax_knows(name: str) -> None:
    from mindjax.cli import build_parser

    (container,) = pods(yaml.safe_load((CLUSTER / name).read_text()))["template"]["spec"]["containers"]
    program, *arguments = container["command"]
    _, rest = build_parser().parse_known_args(arguments)
    assert program == "mindjax" and rest == []
    assert (ROOT / "experiments" / "sft.py").exists()


# ---- Ray


@pytest.mark.prove
def test_ray_job_runs_fails_and_restarts_on_a_real_cluster(tmp_path: Path) -> None:
    """Two Ray nodes on this machine. Ray is 300 MB, so it has an environment of its own, made once."""
    python = ROOT / ".cache" / "ray" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "ray==2.60.0"], check=True)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [python, "-m", "tests.cluster.ray_cluster", tmp_path],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{site}"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["computes"]["status"] == 0
    assert results["computes"]["lines"] == [
        "several True first False devices 2 values [26.0]",
        "several True first True devices 2 values [25.0]",
    ]
    assert results["fails once"]["status"] == 0 and results["fails once"]["attempts"] == 2
    assert results["is a mistake"]["status"] == 2 and results["is a mistake"]["attempts"] == 1
    assert results["one of two fails"]["status"] != 0
