"""The manifest for Kubernetes: fields that exist, and what it says agrees with the script that it starts."""

import copy
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskmatch_scale.cli.main import MISTAKE
from maskmatch_scale.errors import RESUMABLE

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
MANIFEST = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
SCHEMA = yaml.safe_load(Path(__file__).with_name("jobset_schema.yaml").read_text())
JOB = MANIFEST["spec"]["replicatedJobs"][0]
POD = JOB["template"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
VARIABLES = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}


def test_the_manifest_has_the_fields_of_a_jobset():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(MANIFEST, SCHEMA)


@pytest.mark.parametrize("wrong", ["unknown", "number", "action"])
def test_a_wrong_field_is_found(wrong):
    manifest = copy.deepcopy(MANIFEST)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    if wrong == "unknown":
        job["backofLimit"] = job.pop("backoffLimit")
    elif wrong == "number":  # variables are text
        job["template"]["spec"]["containers"][0]["env"][0]["value"] = 2
    else:
        manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJob"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_a_stop_is_started_again_and_a_mistake_is_not():
    by_code, by_condition = JOB["template"]["spec"]["podFailurePolicy"]["rules"]
    assert by_code["onExitCodes"]["values"] == [MISTAKE, RESUMABLE]
    assert by_code["onExitCodes"]["containerName"] == CONTAINER["name"]
    assert by_condition["onPodConditions"][0]["type"] == "DisruptionTarget"
    mistake, stopped = MANIFEST["spec"]["failurePolicy"]["rules"]
    assert (mistake["action"], stopped["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    # What Kubernetes writes about a Job that failed by such a rule.
    message = "Container train for pod default/maskmatch-0 failed with exit code {} matching FailJob rule at index 0"
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    assert pattern in message.format(MISTAKE)
    assert pattern not in message.format(RESUMABLE)


def test_machines_names_and_volumes_agree():
    name, spec = MANIFEST["metadata"]["name"], JOB["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == int(VARIABLES["NNODES"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == VARIABLES["RANKS"]
    assert VARIABLES["MASTER_ADDR"] == f"{name}-{JOB['name']}-0-0.{name}"
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_its_command_starts_torchrun_on_each_machine(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    script = ROOT / CONTAINER["command"][0]
    usage = subprocess.run([script], capture_output=True, text=True, check=False).stderr
    assert all(f"  {name} " in usage for name in VARIABLES)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for index in range(int(VARIABLES["NNODES"])):
        done = subprocess.run(
            [script, "--dry-run", *CONTAINER["args"]],
            env={"PATH": path, "JOB_COMPLETION_INDEX": str(index), **VARIABLES},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        words = shlex.split(done.stdout)
        assert words[words.index("--node-rank") + 1] == str(index)
        assert words[words.index("--master-addr") + 1] == VARIABLES["MASTER_ADDR"]
        assert words[-3:] == ["run.dir=/shared/runs/mine", "--resume", "auto"]
