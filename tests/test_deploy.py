"""The files that start Gristmill elsewhere: each is read by what reads it there, as far as that can
be had on one machine.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import typer
import yaml
from pathspec import PathSpec

from tests.support.paths import ROOT
from tests.support.processes import free_ports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAUNCHER = ROOT / "cluster.yaml"
KUBERAY, SLURM = (
    sorted(ROOT.glob(f"configs/{pattern}")) for pattern in ("kuberay/*.yaml", "slurm/*.sh")
)
# one node; srun's own options are not looked at
STUBS = {
    "scontrol": "echo 127.0.0.1",
    "srun": 'shift 2; exec "$@"',
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


# --- the cluster launcher on AWS ------------------------------------------------------------------


@pytest.fixture
def launcher() -> dict[str, Any]:
    """cluster.yaml as `ray up` completes and checks it, against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(LAUNCHER))
    validate_config(config)
    return config


def test_the_launchers_head_works_on_nothing_and_is_seen_by_no_one(launcher):
    start = " ".join(launcher["head_start_ray_commands"])
    assert (
        launcher["available_node_types"]["head"]["resources"] == {"CPU": 0}
        and "--num-cpus=0" in start
    )
    assert (
        "--dashboard-host=127.0.0.1" in start
        and "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    )
    # Ray's defaults would install another Ray
    assert launcher["setup_commands"] == launcher["head_setup_commands"] == []
    assert not re.search("aws_credentials|AKIA|ssh_private_key|aws_secret", LAUNCHER.read_text())


def test_the_launchers_driver_has_a_machine_that_stays_and_does_nothing_else(launcher):
    node_type = launcher["available_node_types"]["driver"]
    assert node_type["resources"] == {"CPU": 0, "driver": 1} and node_type["max_workers"] == 1
    assert "InstanceMarketOptions" not in node_type["node_config"]
    most = sum(each.get("max_workers", 0) for each in launcher["available_node_types"].values())
    assert launcher["max_workers"] == most


def test_the_launcher_starts_the_machines_that_were_meant(
    launcher, s3_server, tmp_path, monkeypatch
):
    """By Ray's own code for AWS, down to the instances that a server with AWS's interface then has."""
    boto3 = pytest.importorskip("boto3")
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # the key pair's private half is written there
    for name in ("gristmill-head", "gristmill-worker"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    ready = bootstrap_aws(launcher)
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for kind, node_type in ready["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-user-node-type": kind}, 1)
    started = [
        i for r in boto3.client("ec2").describe_instances()["Reservations"] for i in r["Instances"]
    ]
    assert {
        (
            i["InstanceType"],
            i.get("InstanceLifecycle"),
            i["IamInstanceProfile"]["Arn"].split("/")[1],
        )
        for i in started
    } == {
        ("m7i.2xlarge", None, "gristmill-head"),
        ("m7i.large", None, "gristmill-worker"),  # for the driver
        ("m7i.8xlarge", "spot", "gristmill-worker"),
        ("p5.48xlarge", None, "gristmill-worker"),
    }


# --- KubeRay --------------------------------------------------------------------------------------


def fields(*required: str, **types: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": types,
        "required": list(required),
        "additionalProperties": False,
    }


# Of KubeRay's definitions the fields that are used here, by hand: the API server drops or refuses
# any other. Read at commits 034971d (raycronjobs.yaml), 0057210 (reference/api.md, rayjob_types.go)
# of ray-project/kuberay; pod templates were checked by kubernetes-validate 1.37.
TEXT, COUNT, YES_NO, POD = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
    fields("spec", spec={}),
)
START = {"type": "object", "additionalProperties": TEXT}  # text even for numbers
GROUP = fields(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=START,
    template=POD,
)
CLUSTER = fields("headGroupSpec", "rayVersion", rayVersion=TEXT, authOptions=fields("mode", mode={"enum": ["token"]}),
                 enableInTreeAutoscaling=YES_NO, autoscalerOptions=fields(idleTimeoutSeconds=COUNT),
                 headGroupSpec=fields("rayStartParams", "template", rayStartParams=START, template=POD),
                 workerGroupSpecs={"type": "array", "items": GROUP})  # fmt: skip
JOB = fields("entrypoint", "rayClusterSpec", entrypoint=TEXT, entrypointNumCpus={"type": "number"}, entrypointResources=TEXT,
             backoffLimit=COUNT, shutdownAfterJobFinishes=YES_NO,
             ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER)  # fmt: skip
CRON = fields("schedule", "jobTemplate", schedule=TEXT, timeZone=TEXT, jobTemplate=JOB)
LABELS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("jobTemplate", manifest["spec"])


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_manifest_has_what_kuberay_knows(path):
    manifest = read(path)
    spec = {"RayJob": JOB, "RayCronJob": CRON}[manifest["kind"]]
    whole = fields(
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind=TEXT,
        metadata=fields(name=NAME, labels=LABELS, annotations=LABELS),
        spec=spec,
    )
    jsonschema.validate(manifest, whole)
    cluster = job_of(manifest)["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        # the operator refuses others with the autoscaler that Ray 2.60 has
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            # Ray reads the limits, Kubernetes the requests: apart, nodes are overfilled
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_head_is_as_large_as_ray_says_and_no_driver_is_on_it(path):
    """Ray's best practices for large clusters, "Configuring the head node": 8 CPUs, 32 GB, CPU: 0."""
    job = job_of(read(path))
    head = job["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    [container] = head["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "32Gi"}
    nodes = autoscaled_nodes(job["rayClusterSpec"])
    wanted = json.loads(job.get("entrypointResources", "{}"))
    wanted |= {"CPU": job.get("entrypointNumCpus", 0)}
    assert any(wanted.values())
    fit = [
        name for name, each in nodes.items() if all(each.get(k, 0) >= v for k, v in wanted.items())
    ]
    assert fit and "headgroup" not in fit


def autoscaled_nodes(cluster: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The resources of each group's nodes, as Ray's autoscaler reads them from KubeRay's cluster."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    resource = {"metadata": {"name": "name", "namespace": "namespace"}, "spec": cluster}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    return {name: each["resources"] for name, each in config["available_node_types"].items()}


def test_a_driver_has_a_node_that_no_unit_fits_on():
    for name in ("curate", "batch"):
        job = job_of(read(ROOT / f"configs/kuberay/{name}.yaml"))
        nodes = autoscaled_nodes(job["rayClusterSpec"])
        assert nodes["driver"] == {"CPU": 0, "memory": 8 << 30, "driver": 1}
        assert nodes["cpu"] == {"CPU": 16, "memory": 64 << 30}


# What Kueue's webhook for RayJobs refuses, by hand: pkg/controller/jobs/rayjob/rayjob_webhook.go at
# commit 0394bfa and raycluster_webhook.go at 0205cda of kubernetes-sigs/kueue. That `suspend` is the
# webhook's to set: kubernetes-sigs/kueue#8315, #8900.
def refused_by_kueue(job: dict[str, Any], annotations: dict[str, str]) -> list[str]:
    cluster = job.get("rayClusterSpec", {})
    groups = cluster.get("workerGroupSpecs", [])
    elastic = annotations.get("kueue.x-k8s.io/elastic-job") == "true"
    rules = {
        "an existing cluster": "clusterSelector" in job or not cluster,
        "a cluster that stays": not job.get("shutdownAfterJobFinishes"),
        "a cluster that grows": cluster.get("enableInTreeAutoscaling") and not elastic,
        "more than 7 groups": len(groups) > 7,
        "a group named head": "head" in [group["groupName"] for group in groups],
    }
    return [rule for rule, broken in rules.items() if broken]


@pytest.mark.parametrize("name", ["curate", "train"])
def test_kueue_queues_a_job_and_nothing_waits_without_kueue(name):
    manifest = read(ROOT / f"configs/kuberay/{name}.yaml")
    metadata = manifest["metadata"]
    assert metadata["labels"] == {"kueue.x-k8s.io/queue-name": "gristmill"}
    assert refused_by_kueue(manifest["spec"], metadata.get("annotations", {})) == []
    assert "suspend" not in manifest["spec"]


def test_kueue_takes_scheduled_jobs_once_their_cluster_does_not_grow():
    """KubeRay gives them the spec, and no label or annotation of the RayCronJob."""
    job = job_of(read(ROOT / "configs/kuberay/batch.yaml"))
    assert refused_by_kueue(job, {}) == ["a cluster that grows"]
    job["rayClusterSpec"]["enableInTreeAutoscaling"] = False
    assert refused_by_kueue(job, {}) == []


def test_the_batch_has_the_cluster_of_a_run():
    curate, batch = (
        job_of(read(ROOT / f"configs/kuberay/{name}.yaml"))["rayClusterSpec"]
        for name in ("curate", "batch")
    )
    assert curate == batch


# --- images ---------------------------------------------------------------------------------------


def dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, in order, with those of the stage it begins from."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace(
        "\\\n", ""
    )
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            origin, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            steps = stages[name] = [*stages.get(origin, [])]
        else:
            steps.append((word, rest))
    return stages


def test_every_file_that_an_image_copies_is_there_and_sent_to_docker():
    ignored = PathSpec.from_lines("gitignore", (ROOT / ".dockerignore").read_text().splitlines())
    for name, steps in dockerfile().items():
        for source in (
            s
            for word, rest in steps
            if word == "COPY" and "--from" not in rest
            for s in shlex.split(rest)[:-1]
        ):
            files = [
                p
                for p in [ROOT / source, *(ROOT / source).rglob("*")]
                if p.is_file() and "__pycache__" not in p.parts
            ]
            assert files, f"{name}: {source}"
            assert not [f for f in files if ignored.match_file(f.relative_to(ROOT))], (
                f"{name}: {source}"
            )
    assert all(
        ignored.match_file(f"{name}/file")
        for name in (".git", ".venv", "runs", ".kenlm", "artifacts")
    )


@pytest.mark.parametrize("target", ["curation", "trainer"])
def test_an_image_runs_the_command_as_no_one_special_and_holds_what_was_built_for_it(target):
    stages = dockerfile()
    steps = stages[target]
    assert dict(steps)["USER"] == "1000"
    assert yaml.safe_load(dict(steps)["CMD"])[0] in PROJECT["scripts"]
    copied = [re.search(r"--from=(\S+)", rest) for word, rest in steps if word == "COPY"]
    assert {found[1] for found in copied if found} <= stages.keys() - {target}
    assert not re.search(
        r"pip install|cmake|g\+\+|build-essential", " ".join(rest for _, rest in steps)
    )
    installs = [
        rest for word, rest in stages[f"{target}-build"] if word == "RUN" and "pip install" in rest
    ]
    extras = re.search(r"'\.\[([\w,]+)\]'", installs[0])[1].split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys() and ("train" in extras) == (
        target == "trainer"
    )


def test_all_files_name_the_same_images_and_the_same_ray():
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert {job_of(read(path))["rayClusterSpec"]["rayVersion"] for path in KUBERAY} == {pinned}
    images = [
        m
        for p in [LAUNCHER, ROOT / "Dockerfile", *KUBERAY]
        for m in re.findall(r"\S+/gristmill-(\w+):(\S+)", p.read_text())
    ]
    assert {version for _, version in images} == {PROJECT["version"]}
    assert {target for target, _ in images} == {"curation", "trainer"} <= dockerfile().keys()


# --- what is run there ----------------------------------------------------------------------------


def commands(path: Path) -> list[str]:
    """The gristmill commands of a manifest or script; "$@" and the like as a reader would fill them
    in.
    """
    text = job_of(read(path))["entrypoint"] if path.suffix == ".yaml" else path.read_text()
    filled = {'"$@" && touch "$0"\'': "configs/quickstart.toml", '"$@" &': "", '"$config"': "configs/train_tiny.toml",
              '"$folder"': "FOLDER", "/shared/train.toml": "configs/train_tiny.toml"}  # fmt: skip
    for old, new in filled.items():
        text = text.replace(old, new)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [
        m for line in lines for m in re.findall(r"gristmill (?:run|batch|train) [^\n\"']*", line)
    ]


@pytest.mark.parametrize("path", [*KUBERAY, *SLURM], ids=lambda path: path.name)
def test_the_commands_are_the_command_lines_and_their_keys_the_configs(path):
    from pipeline.__main__ import app
    from pipeline.config.load import load
    from pipeline.config.train import load_training

    group = typer.main.get_command(app)
    for command in commands(path) or pytest.fail("no command found"):
        _, name, *words = shlex.split(command)
        given = group.commands[name].make_context(name, words, parent=click.Context(group)).params
        (load_training if name == "train" else load)(
            ROOT / given["config"], given["overrides"] or []
        )


def test_ray_job_submit_sends_what_a_run_needs_and_little_more(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(
        str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    names = set(zipfile.ZipFile(package).namelist())
    needed = [
        "configs/quickstart.toml",
        "pipeline/__main__.py",
        "filters/lid.176.ftz",
        "models/wiki-en.5gram.bin",
    ]
    assert names.issuperset([*needed, *(f"samples/{p.name}" for p in ROOT.glob("samples/*.gz"))])
    assert not {n.split("/")[0] for n in names} & {
        ".git",
        ".venv",
        ".kenlm",
        "runs",
        "artifacts",
        "tests",
        "benchmarks",
    }
    assert package.stat().st_size < 20 << 20  # Ray refuses more than 500 MiB


# --- Slurm ----------------------------------------------------------------------------------------


def environment(folder: Path, **stubs: str) -> dict[str, str]:
    for name, body in (STUBS | stubs).items():
        Path(folder, name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        Path(folder, name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.path.dirname(sys.executable), os.environ["PATH"]])
    slurm = {
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
    }
    return os.environ | slurm | {"PATH": path}


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_a_script_is_a_script(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
    assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_that_never_began_is_no_success(tmp_path, code):
    """symmetric-run exits 0 when Ray could not be started; a run's own code is handed on."""
    env = environment(tmp_path, ray=f"[[ $1 != symmetric-run ]] || exit {code}")
    done = subprocess.run(["bash", SLURM[0], "x.toml"], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == (code or 1)


def test_the_end_of_the_time_asks_a_training_to_save_and_waits_for_it(tmp_path):
    saving = f"touch {tmp_path}/begun; until [[ -e {tmp_path}/stop ]]; do sleep 0.05; done; sleep 0.3; touch {tmp_path}/saved"
    script = subprocess.Popen(
        ["bash", SLURM[1], "x.toml", tmp_path], cwd=tmp_path, env=environment(tmp_path, srun=saving)
    )
    while not Path(tmp_path, "begun").exists():
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(300) == 0 and Path(tmp_path, "saved").exists()


@pytest.mark.ray
@pytest.mark.kill
def test_symmetric_run_brings_a_run_to_its_end(tmp_path):
    """The real one, where `ray stop`, with which it ends, sees no Ray but its own: in a space of
    its own for processes.
    """
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*apart, "true"], capture_output=True).returncode
    ):
        pytest.skip("no PID namespaces for this user")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # paths of sockets have 107 characters
        env = environment(tmp_path) | {"RAY_TMPDIR": short, "RAY_PORT": str(free_ports(1)[0])}
        overrides = [
            f"run.directory={tmp_path}/run",
            f'input.paths=["{ROOT}/samples/apache2-doc.warc.gz"]',
        ]
        words = ["bash", SLURM[0], "configs/quickstart.toml", *overrides, "--only", "extract"]
        done = subprocess.run([*apart, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "On head node" in done.stdout and list(
        Path(tmp_path, "run", "extract").rglob("*.parquet")
    )
    assert not list(ROOT.glob("slurm-*"))
