# ruff: noqa: N815 (the fields have the names of these APIs)
"""The files of examples/cluster: each against the published form of its kind, and against what torchrun and strop take.

The schemas hold the fields of these APIs that the files use, as published: Kubeflow Trainer 2.3
(trainer.kubeflow.org/v1alpha1), JobSet (jobset.x-k8s.io/v1alpha2), Kubernetes core/v1 and batch/v1, SkyPilot's tasks.
Any other field is refused.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.run import get_args_parser

from strop.cli.train import run as run_train
from strop.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = ("two_machines.sh", "slurm.sh")
IMAGE = "registry.example.com/strop:0.1.0"
DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
Name = Field(pattern=f"^{DNS_LABEL}$")
Quantity = Field(pattern=r"^[0-9]+(Ki|Mi|Gi|Ti)?$")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Meta(Strict):
    name: str = Name


class EnvVar(Strict):
    name: str
    value: str


class Mount(Strict):
    name: str = Name
    mountPath: str = Field(pattern="^/")


class Claim(Strict):
    claimName: str = Name


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: str = Quantity


class Volume(Strict):
    name: str = Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Resources(Strict):
    limits: dict[str, int | str]


class ContainerPatch(Strict):
    name: str = Name
    volumeMounts: list[Mount]


class PodPatch(Strict):
    terminationGracePeriodSeconds: int = Field(ge=60)
    volumes: list[Volume]
    containers: list[ContainerPatch]


class PodPatchTemplate(Strict):
    spec: PodPatch


class JobPatch(Strict):
    template: PodPatchTemplate


class JobPatchTemplate(Strict):
    spec: JobPatch


class ReplicatedJobPatch(Strict):
    name: str = Name
    template: JobPatchTemplate


class JobSetPatch(Strict):
    replicatedJobs: list[ReplicatedJobPatch]


class JobSetPatchTemplate(Strict):
    spec: JobSetPatch


class RuntimeSpecPatch(Strict):
    template: JobSetPatchTemplate


class RuntimePatch(Strict):
    manager: str = Field(pattern=r"^[a-z0-9.-]+/[a-z0-9-]+$")
    trainingRuntimeSpec: RuntimeSpecPatch


class RuntimeRef(Strict):
    apiGroup: Literal["trainer.kubeflow.org"]
    kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"]
    name: str = Name


class Trainer(Strict):
    image: str
    command: list[str]
    args: list[str]
    env: list[EnvVar]
    numNodes: int = Field(ge=1)
    numProcPerNode: int = Field(ge=1)
    resourcesPerNode: Resources


class TrainJobSpec(Strict):
    runtimeRef: RuntimeRef
    trainer: Trainer
    runtimePatches: list[RuntimePatch]


class TrainJob(Strict):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Meta
    spec: TrainJobSpec


class Port(Strict):
    containerPort: int = Field(ge=1, le=65535)


class Container(Strict):
    name: str = Name
    image: str
    command: list[str]
    args: list[str]
    env: list[EnvVar]
    ports: list[Port]
    resources: Resources
    volumeMounts: list[Mount]


class Pod(Strict):
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: int = Field(ge=60)
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(Strict):
    spec: Pod


class Job(Strict):
    parallelism: int = Field(ge=1)
    completions: int = Field(ge=1)
    completionMode: Literal["Indexed", "NonIndexed"]
    backoffLimit: int = Field(ge=0)
    template: PodTemplate


class JobTemplate(Strict):
    spec: Job


class ReplicatedJob(Strict):
    name: str = Name
    replicas: int = Field(ge=1)
    template: JobTemplate


class Network(Strict):
    enableDNSHostnames: bool
    publishNotReadyAddresses: bool


class FailurePolicy(Strict):
    maxRestarts: int = Field(ge=0)


class JobSetSpec(Strict):
    network: Network
    failurePolicy: FailurePolicy
    replicatedJobs: list[ReplicatedJob]


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Meta
    spec: JobSetSpec


class JobRecovery(Strict):
    max_restarts_on_errors: int = Field(ge=0)


class SkyResources(Strict):
    accelerators: str = Field(pattern=r"^[A-Z0-9]+:[0-9]+$")
    image_id: str = Field(pattern=r"^docker:")
    job_recovery: JobRecovery


class SkyTask(Strict):
    name: str = Name
    num_nodes: int = Field(ge=1)
    resources: SkyResources
    volumes: dict[str, str]
    envs: dict[str, str]
    run: str


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def train_job() -> TrainJobSpec:
    return TrainJob.model_validate(read("trainjob.yaml")).spec


def job_set() -> JobSet:
    return JobSet.model_validate(read("jobset.yaml"))


def sky_task() -> SkyTask:
    return SkyTask.model_validate(read("skypilot.yaml"))


def shell_of(name: str) -> str:
    return sky_task().run if name == "skypilot.yaml" else (FOLDER / name).read_text(encoding="utf-8")


def commands() -> dict[str, list[str]]:
    """The arguments of torchrun, by file."""
    pod = job_set().spec.replicatedJobs[0].template.spec.template.spec.containers[0]
    found = {"trainjob.yaml": [*train_job().trainer.args], "jobset.yaml": [*pod.args]}
    for name in (*SCRIPTS, "skypilot.yaml"):
        joined = shell_of(name).replace("\\\n", " ")
        (line,) = [line for line in joined.splitlines() if re.search(r"\btorchrun +--", line)]
        found[name] = shlex.split(re.sub(r"\$[A-Za-z_]+", "7", line.partition("torchrun")[2]))
    return found


@pytest.mark.parametrize("name", [*SCRIPTS, "skypilot.yaml"])
def test_shell_parses(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(shell_of(name), encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", sorted([*SCRIPTS, "skypilot.yaml", "trainjob.yaml", "jobset.yaml"]))
def test_torchrun_and_strop_take_what_they_are_given(name: str) -> None:
    given = get_args_parser().parse_args(commands()[name])
    assert given.module and given.training_script == "strop"
    command, *arguments = given.training_script_args
    assert command == "train" and arguments[-1] == "--resume", "whatever starts it again goes on"
    with pytest.raises(ConfigError, match="No such file or directory"):  # on the cluster; the flags were taken
        run_train(arguments)


def test_the_train_job_is_one() -> None:
    spec = train_job()
    (patch,) = spec.runtimePatches
    (job,) = patch.trainingRuntimeSpec.template.spec.replicatedJobs
    pod = job.template.spec.template.spec
    assert job.name == "node" == pod.containers[0].name, "as the runtime torch-distributed names them"
    assert spec.trainer.command == ["torchrun"] and spec.trainer.image == IMAGE
    assert spec.trainer.numProcPerNode == spec.trainer.resourcesPerNode.limits["nvidia.com/gpu"]
    assert {mount.name for mount in pod.containers[0].volumeMounts} == {volume.name for volume in pod.volumes}


def test_the_job_set_is_one() -> None:
    found = job_set()
    (replicated,) = found.spec.replicatedJobs
    job = replicated.template.spec
    pod = job.template.spec
    (container,) = pod.containers
    given = get_args_parser().parse_args(commands()["jobset.yaml"])
    assert job.parallelism == job.completions == int(given.nnodes)
    assert int(given.nproc_per_node) == container.resources.limits["nvidia.com/gpu"]
    host, _, port = given.rdzv_endpoint.partition(":")
    assert host == f"{found.metadata.name}-{replicated.name}-0-0.{found.metadata.name}", (
        "the first pod of the first job"
    )
    assert [int(port)] == [p.containerPort for p in container.ports]
    assert container.image == IMAGE and container.command == ["torchrun"]
    assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}


def test_the_sky_task_is_one() -> None:
    task = sky_task()
    assert task.resources.image_id == f"docker:{IMAGE}"
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK"}
    assert set(re.findall(r"\$(SKYPILOT_\w+)", task.run)) == known


def test_the_batch_script_asks_for_one_task_per_machine() -> None:
    text = shell_of("slurm.sh")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert len(options) == text.count("#SBATCH "), "each is an option of sbatch with its value"
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("TERM@")
    assert text.index("#SBATCH --output") < text.index("set -euo"), "sbatch reads options up to the first command"


INSTRUCTIONS = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}


def test_the_container_file_builds_from_what_is_here() -> None:
    text = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in lines} <= INSTRUCTIONS
    assert [word for word, _ in lines][:2] == ["ARG", "FROM"]
    for _, rest in (line for line in lines if line[0] == "COPY"):
        *sources, _ = rest.split()
        assert all((ROOT / source).exists() for source in sources)
    assert f"-t {IMAGE} ." in text
    (torch_there,) = re.findall(r"pytorch:([0-9.]+)-cuda", text)
    assert f"torch=={torch_there}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8"), "it is not replaced"
    assert f'version = "{IMAGE.rpartition(":")[2]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["unknown field", "wrong type", "wrong version"])
def test_the_schemas_refuse_what_the_apis_do(change: str) -> None:
    found = read("trainjob.yaml")
    if change == "unknown field":
        found["spec"]["podTemplateOverrides"] = []  # as it was called before 2.2
    elif change == "wrong type":
        found["spec"]["trainer"]["numNodes"] = "2"
    else:
        found["apiVersion"] = "kubeflow.org/v1"
    with pytest.raises(ValueError, match="1 validation error"):
        TrainJob.model_validate(found)
