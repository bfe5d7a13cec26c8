"""Holds the manifests to the schemas of Kubernetes, to the program's options, and to what the README promises."""

import re
import subprocess
import sys

import kubernetes_validate
import yaml

VERSION = "1.37.0"


def fail(message):
    sys.exit(f"deploy: {message}")


def rendered(renderer, folder):
    text = subprocess.run([*renderer, folder], check=True, capture_output=True, text=True).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def only(documents, kind):
    found = [document for document in documents if document["kind"] == kind]
    if len(found) != 1:
        fail(f"{len(found)} of kind {kind}, expected one")
    return found[0]


def check(name, documents, variables):
    for document in documents:
        try:
            kubernetes_validate.validate(document, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            fail(f"{name}: {document['kind']} {document['metadata']['name']}: {error.message} at {list(error.path)}")

    cron_job = only(documents, "CronJob")["spec"]
    job = cron_job["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    promises = {
        "no two at once": cron_job["concurrencyPolicy"] == "Forbid",
        "deadlines": cron_job["startingDeadlineSeconds"] > 0 and job["activeDeadlineSeconds"] > 0,
        "a job has its deadline for one try": job["backoffLimit"] == 0,
        "not root": pod["securityContext"]["runAsNonRoot"] is True,
        "read-only root": container["securityContext"]["readOnlyRootFilesystem"] is True,
        "no privileges": container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        and container["securityContext"]["allowPrivilegeEscalation"] is False,
        "bounded memory": "memory" in container["resources"]["limits"],
        "no Kubernetes token": pod["automountServiceAccountToken"] is False,
        "a network policy for these pods": only(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
        <= job["template"]["metadata"]["labels"].items(),
    }
    for promise, kept in promises.items():
        if not kept:
            fail(f"{name}: {promise} is not kept")

    config = only(documents, "ConfigMap")
    own_end = sum(int(config["data"][name]) for name in ["DIR_SYNC_START_JITTER", "DIR_SYNC_DEADLINE"])
    if own_end + pod["terminationGracePeriodSeconds"] >= job["activeDeadlineSeconds"]:
        fail(f"{name}: the job is ended before the program's own deadline")
    if container["envFrom"] != [{"configMapRef": {"name": config["metadata"]["name"]}}]:
        fail(f"{name}: the container does not read the config map")
    for variable in [*config["data"], *(entry["name"] for entry in container["env"])]:
        if variable not in variables:
            fail(f"{name}: the program knows no {variable}")
    print(f"{name}: {len(documents)} manifests hold")


def main():
    program, folder, *renderer = sys.argv[1:]
    help_text = subprocess.run([program, "run", "--help"], check=True, capture_output=True, text=True).stdout
    variables = set(re.findall(r"\[env: (DIR_SYNC_[A-Z_]+)", help_text))
    if not variables:
        fail("the program's help names no environment variables")
    for overlay in ["key", "workload-identity"]:
        check(overlay, rendered(renderer, f"{folder}/kubernetes/overlays/{overlay}"), variables)


main()
