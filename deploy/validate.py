#!/usr/bin/env python3
"""Check deploy/kubernetes: each document against Kubernetes' own schemas, strictly (an unknown field
is a fault), and what no schema knows: the drain's arithmetic, and that kustomization.yaml lists
exactly the files that are there. Prints a line a check; exits 1 on any fault.

    python3 -m venv /tmp/validate && /tmp/validate/bin/pip install kubernetes-validate pyyaml
    /tmp/validate/bin/python deploy/validate.py
"""

import copy
import re
import sys
from pathlib import Path

import kubernetes_validate
import yaml

HERE = Path(__file__).resolve().parent / "kubernetes"
VERSION = kubernetes_validate.utils.latest_version()
SETTLING = 12  # seconds that a drain may take besides grace: claims on their way, settling, the lease
faults = 0


def check(what, fault):
    global faults
    faults += bool(fault)
    print(f"FAULT {what}: {fault}" if fault else f"ok    {what}")


def fault_of(document):
    """What the schema has against a document; none if it is valid."""
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except Exception as error:  # no schema for its kind, not an object, no apiVersion
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"


def seconds(text):
    """A duration as the manifests write it: 25s, 5m, 1h."""
    match = re.fullmatch(r"(\d+)([smh])", text)
    if not match:
        raise ValueError(f"{text!r}: write it as 25s, 5m or 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def duration(toml, key):
    match = re.search(rf'^{key} = "([^"]+)"$', toml, re.M)
    if not match:
        raise ValueError(f"pgcue.toml does not say {key}")
    return seconds(match[1])


found = {}
for path in sorted(HERE.glob("*.y*ml")):
    if path.name == "kustomization.yaml":
        continue
    documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
    if not documents:
        check(path.name, "holds no document")
    for document in documents:
        kind, name = document.get("kind"), document.get("metadata", {}).get("name")
        found[kind, name] = document
        check(f"{path.name}: {kind} {name}, Kubernetes {VERSION}", fault_of(document))

listed = yaml.safe_load((HERE / "kustomization.yaml").read_text())["resources"]
there = {path.name for path in HERE.glob("*.y*ml")} - {"kustomization.yaml"}
check("kustomization.yaml lists each file, and each exists", sorted(there.symmetric_difference(listed)))

try:
    deployment, job = found["Deployment", "pgcue"], found["Job", "pgcue-migrate"]
    toml = found["ConfigMap", "pgcue"]["data"]["pgcue.toml"]
    pods = {"Deployment": deployment["spec"]["template"]["spec"], "Job": job["spec"]["template"]["spec"]}
    grace, lease = duration(toml, "grace"), duration(toml, "lease")
    patience = pods["Deployment"]["terminationGracePeriodSeconds"]
    short = patience <= grace + SETTLING
    check(
        f"the drain fits: {patience}s > grace {grace}s + settling {SETTLING}s (lease {lease}s)",
        short and "Kubernetes would kill a node that drains",
    )
    for kind, pod in pods.items():
        links = pod.get("enableServiceLinks", True)
        check(f"{kind}: no service links", links and "they become PGCUE_* variables")

    # Break a copy on purpose: a check that passes these checks nothing.
    for what, place, value in [
        ("a number as text", ("replicas",), "three"),
        ("an unknown field", ("replicsa",), 3),
        ("a misspelt field deep inside", ("template", "spec", "terminationGracePeriod"), 40),
    ]:
        broken = copy.deepcopy(deployment)
        target = broken["spec"]
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value
        check(f"{what} is refused", not fault_of(broken) and "the validation accepts anything")
except (KeyError, ValueError) as error:
    check("what no schema knows", f"{type(error).__name__}: {error}")

sys.exit(1 if faults else 0)
