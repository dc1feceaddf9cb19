"""What the guide to clusters shows beside Python: a program, a script for SLURM, manifests for Kubernetes."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.support.examples import ROOT
from tests.support.markdown import DOCS, blocks

PAGE = blocks((DOCS / "guides" / "clusters.md").read_text())
MANIFESTS = ROOT / "examples" / "kubernetes"


def program(folder, named, text):
    """Write a program that is found by its name."""
    path = folder / named
    path.write_text(text)
    path.chmod(0o755)
    return path


def shown(kind, beginning):
    (text,) = [block.text for block in PAGE if block.kind == kind and block.text.startswith(beginning)]
    return text


# The program


def test_the_program_trains_on_two_workers_and_resumes(tmp_path):
    (tmp_path / "train.py").write_text(shown("py", "# train.py"))
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    for epochs in (1, 2):
        command = [sys.executable, "-m", "tapeloop", "launch", "-n", "2", "train.py", "--epochs", str(epochs)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(done.stdout.splitlines()) == [f"[{n}] ended at step {8 * epochs}" for n in range(2)]
        assert ("[0] Resuming from" in done.stderr) == (epochs == 2)


# SLURM

SCRIPT = shown("bash", "#!/bin/bash")


@pytest.mark.parametrize(
    ("status", "restarts", "requeued", "ends"),
    [(0, None, False, 0), (143, None, True, 1), (1, "9", True, 1), (1, "10", False, 1)],
)
def test_the_script_is_queued_again_until_the_run_is_through(tmp_path, status, restarts, requeued, ends):
    program(tmp_path, "srun", f'#!/bin/sh\necho srun "$@" >> called\nexit {status}\n')
    program(tmp_path, "scontrol", '#!/bin/sh\necho scontrol "$@" >> called\n')
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    script = program(tmp_path, "script", SCRIPT)
    assert subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, check=False).returncode == ends
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0].endswith("python train.py --epochs 100 --run /shared/runs/first")
    assert called[1:] == (["scontrol requeue 77"] if requeued else [])


def test_workers_have_time_to_save_themselves_before_the_job_ends():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT, re.MULTILINE))
    assert SCRIPT.split("\n\n")[0].count("#SBATCH") == SCRIPT.count("#SBATCH") == len(options)  # all before a command
    signal, seconds = options["signal"].split("@")
    (wait,) = re.findall(r"--wait=(\d+)", SCRIPT)
    assert signal == "TERM"
    assert int(wait) < int(seconds)
    assert "--kill-on-bad-exit=0" in SCRIPT  # which would kill those that are saving themselves


# Kubernetes


def test_the_manifests_hold_what_the_guide_says():
    kinds = {path.name: [each["kind"] for each in yaml.safe_load_all(path.read_text())] for path in MANIFESTS.iterdir()}
    assert kinds == {"workers.yaml": ["Service", "StatefulSet"], "runs.yaml": ["PersistentVolumeClaim"]}


@pytest.fixture
def manifests():
    """The service, the stateful set and the claim."""
    return [
        *yaml.safe_load_all((MANIFESTS / "workers.yaml").read_text()),
        *yaml.safe_load_all((MANIFESTS / "runs.yaml").read_text()),
    ]


def test_they_name_each_other(manifests):
    service, workers, claim = manifests
    assert [each["apiVersion"] for each in manifests] == ["v1", "apps/v1", "v1"]
    spec, labels = workers["spec"], workers["spec"]["template"]["metadata"]["labels"]
    assert spec["serviceName"] == service["metadata"]["name"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    pod = spec["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
    assert "ReadWriteMany" in claim["spec"]["accessModes"]


def test_pods_can_find_each_other_while_they_start(manifests):
    service, workers, _ = manifests
    assert service["spec"]["clusterIP"] == "None"  # the text, which makes it headless
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert workers["spec"]["podManagementPolicy"] == "Parallel"


def test_pods_are_restarted_and_have_time_to_save_themselves(manifests):
    pod = manifests[1]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Always"  # the only one that a StatefulSet may have
    assert pod["terminationGracePeriodSeconds"] > 30  # Kubernetes' own


@pytest.mark.parametrize("number", [1, 2, 11])
def test_a_pod_makes_its_configuration_from_its_name(manifests, tmp_path, number):
    service, workers, _ = manifests
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    name, values = workers["metadata"]["name"], {each["name"]: each for each in container["env"]}
    assert values["WORKERS"]["value"] == str(workers["spec"]["replicas"])
    assert values["POD"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    program(tmp_path, "python", '#!/bin/sh\nprintf "%s\\n" "$TF_CONFIG" "$*" $$\n')
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WORKERS": str(number)}
    command = [*container["command"], *container["args"]]
    with subprocess.Popen(
        command, env={**environment, "POD": f"{name}-{number - 1}"}, stdout=subprocess.PIPE, text=True
    ) as started:
        said = started.stdout.read().splitlines()
    assert started.returncode == 0
    (port,) = [each["containerPort"] for each in container["ports"]]
    assert [each["port"] for each in service["spec"]["ports"]] == [port]
    hosts = [f"{name}-{index}.{service['metadata']['name']}:{port}" for index in range(number)]
    assert json.loads(said[0]) == {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": number - 1}}
    assert said[1].startswith("train.py ")
    assert int(said[2]) == started.pid  # it is the process that Kubernetes sends SIGTERM to
