"""The whole mission on a real node, and what may come between."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from controlplane import ROOT
from missions import BATCH, CORE, Mission
from node_machine import is_ready


def test_submit_trains_merges_publishes_and_anybody_fetches(
    mission: Mission, tmp_path: Path
) -> None:
    """`make submit`, the run's own exit code, then fetch and generate with what was fetched."""
    job, cluster = mission.files("mission", steps=12)
    # The environment is set up; a test does not install it anew.
    command = ["make", "-o", ".venv/.installed", "submit", f"JOB={job}", f"CLUSTER={cluster}"]
    submitted = subprocess.run(
        [*command, "FLAGS=--follow"],
        check=False, cwd=ROOT, env=mission.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr[-3000:]
    run = next(iter(mission.machine.plane.get(f"{BATCH.format(mission.namespace)}/jobs")["items"]))
    name = run["metadata"]["name"]
    receipt = mission.receipt(name)
    assert receipt["version"] in submitted.stdout
    assert mission.over(name) == "Complete"
    [pod] = mission.pods(name)
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    said = json.loads(ended["message"])
    assert said == mission.s3.read(mission.store, f"_runs/{name}/attempts/1/exit.json")
    assert said["receipt"] == receipt
    manifest = mission.s3.read(
        mission.store, f"mission/versions/{receipt['version']}/manifest.json"
    )
    assert mission.machine.image in json.dumps(manifest["lineage"])
    assert manifest["lineage"]["save_s"] == mission.head(name)["save_s"] > 0

    fetched = tmp_path / "fetched"
    mission.types("fetch", f"{mission.store}/mission@nightly", fetched)
    words = ("generate", mission.folder / "base", "What is 2 plus 3?", "--max-new-tokens", "4")
    answers = json.loads(
        mission.types(*words, "--adapter", fetched / "adapter", "--output", "json")
    )
    assert len(answers) == 1
    assert (fetched / "merged/config.json").exists()


def test_status_and_list_answer_after_job_and_pods_are_gone(calm: tuple[Mission, str]) -> None:
    """What became of a run is in the store."""
    mission, run = calm
    mission.machine.plane.delete(f"{BATCH.format(mission.namespace)}/jobs/{run}")
    mission.machine.plane.wait(f"{CORE.format(mission.namespace)}/pods", lambda pods: not pods)
    status = mission.ask("status", run, "--store", mission.store)
    assert status["state"] == "succeeded"
    assert status["receipt"] == mission.receipt(run)


def test_deleted_drained_and_killed_the_adapter_is_the_undisturbed_one(
    calm: tuple[Mission, str], mission: Mission
) -> None:
    """Each next attempt goes on from the store; the last one publishes the very same bytes."""
    run = mission.submit("tiny", steps=100)
    plane, pods, ends = mission.machine.plane, f"{CORE.format(mission.namespace)}/pods", []
    step = mission.checkpoint_after(run, 0)

    first = mission.pods(run)[-1]["metadata"]["name"]
    plane.delete(f"{pods}/{first}")  # SIGTERM: it saves, and says 75
    ends.append(75)
    mission.until(run, lambda head: head.get("epoch", 0) == 2)
    step = mission.checkpoint_after(run, step)

    second = mission.pods(run)[-1]["metadata"]["name"]
    with mission.machine.cordoned():  # what `kubectl drain` does: cordon, then evict
        mission.evict(second)
        mission.unschedulable(run)
        why = mission.ask("why", run)
        assert why["cause"] == "cordoned"
        assert "kubectl uncordon" in why["do"]
    ends.append(75)
    mission.until(run, lambda head: head.get("epoch", 0) == 3)
    step = mission.checkpoint_after(run, step)

    third = mission.pods(run)[-1]["metadata"]["name"]
    mission.machine.kill(mission.namespace, third)  # no word of its own
    assert mission.exit_code(third) == 137
    assert mission.over(run) == "Complete"

    head = mission.head(run)
    assert head["epoch"] == 4
    assert [end["code"] for end in head["ends"] if end["code"] == 75] == ends
    undisturbed, name = calm
    theirs = undisturbed.receipt(name)
    assert mission.receipt(run)["adapter_sha256"] == theirs["adapter_sha256"]
    # The deleted and the drained one do not count, the killed one does.
    assert mission.job(run)["status"].get("failed") == 1


def test_a_grace_period_too_short_for_a_save_is_named(mission: Mission) -> None:
    """SIGKILL in the middle of a save: the next attempt goes on, and `why` says what to set."""
    run = mission.submit("slow", steps=4000, grace_period_s=8)
    mission.checkpoint_after(run, 0)
    [pod] = mission.pods(run)
    with mission.s3.proxy.toxic("latency", latency=3000):
        path = f"{CORE.format(mission.namespace)}/pods/{pod['metadata']['name']}"
        mission.machine.plane.delete(path)
        mission.pod_gone(pod["metadata"]["name"])
    end = mission.until(run, lambda head: head["epoch"] == 2 and head["ends"][-1])
    assert (end["code"], end["stopping"]) == (None, True)
    why = mission.ask("why", run)
    assert "was asked to end" in why["what"]
    assert "raise grace_period_s" in why["do"]
    mission.types("cancel", run, "--now", "-n", mission.namespace)


def test_a_node_that_vanishes_holds_its_run_until_somebody_says_that_it_is_dead(
    mission: Mission,
) -> None:
    """Two pods of a run never write at once; `why` names the node and how to let go of it."""
    run = mission.submit("lost")
    mission.checkpoint_after(run, 0)
    [pod] = mission.pods(run)
    name, plane = pod["metadata"]["name"], mission.machine.plane
    with mission.machine.dead(mission.namespace, name):
        path = f"{CORE.format(mission.namespace)}/pods/{name}"
        assert plane.wait_for(path, lambda it: not is_ready(it), within_s=120)
        assert mission.ask("status", run)["state"] == "lost"
        why = mission.ask("why", run)
        assert why["cause"] == "node-lost"
        node = pod["spec"]["nodeName"]
        assert f"kubectl delete node {node}" in why["do"]
        assert [one["metadata"]["name"] for one in mission.pods(run)] == [name]
        taint = {"key": "node.kubernetes.io/out-of-service", "value": "dead"}
        taints = [*plane.get(f"/api/v1/nodes/{node}")["spec"]["taints"]]
        taints.append({**taint, "effect": "NoExecute"})
        plane.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": taints}})
        mission.unschedulable(run)
    assert mission.over(run) == "Complete"
    assert [end["code"] for end in mission.head(run)["ends"]] == [None, 0]


def test_a_full_disk_share_ends_the_run(mission: Mission) -> None:
    """It ends itself before the kubelet evicts it: 71, with the figures and the setting."""
    run = mission.submit("filling", steps=4000, ephemeral_storage="1Mi")
    assert mission.over(run) == "PodFailurePolicy"
    assert [mission.exit_code(pod["metadata"]["name"]) for pod in mission.pods(run)] == [71]
    why = mission.ask("why", run)
    assert "the pod may have 1.0" in why["what"]
    assert "raise ephemeral_storage in the cluster file" in why["do"]


def test_out_of_memory_is_explained(mission: Mission) -> None:
    """The kernel kills it at its limit; `why` says that, and what to change."""
    run = mission.submit("hungry", memory="300Mi", backoff_limit=0)
    assert mission.over(run) == "BackoffLimitExceeded"
    why = mission.ask("why", run)
    assert why["cause"] == "oom-killed"
    assert "300Mi" in str(why)


def test_a_wrong_setting_fails_at_once(mission: Mission) -> None:
    """What only the model can tell is 78: one attempt, no retry, and `why` repeats its line."""
    run = mission.submit("wrong", lora={"target_modules": ["q_prjo"]})
    assert mission.over(run) == "PodFailurePolicy"
    assert [mission.exit_code(pod["metadata"]["name"]) for pod in mission.pods(run)] == [78]
    assert "q_prjo" in str(mission.ask("why", run))


def test_wrong_credentials_fail_at_once(mission: Mission) -> None:
    """A store that refuses them is 77: one attempt, and `why` says so without the store."""
    plane, secret = mission.machine.plane, f"{CORE.format(mission.namespace)}/secrets/s3"
    run_files = mission.files("refused")
    plane.patch(secret, {"stringData": {"aws_secret_access_key": "not-the-one"}})
    words = ("submit", run_files[0], "--cluster", run_files[1], "--no-data-checks")
    run = mission.types(*words).strip()
    assert mission.over(run) == "PodFailurePolicy"
    assert [mission.exit_code(pod["metadata"]["name"]) for pod in mission.pods(run)] == [77]
    assert mission.ask("why", run)["cause"] == "exit-77"


def test_a_minute_without_the_store_is_waited_out(mission: Mission) -> None:
    """Checkpoints wait for the store to come back; it stays one attempt."""
    run = mission.submit("patient")
    mission.checkpoint_after(run, 0)
    mission.s3.proxy.cut()
    time.sleep(60)
    mission.s3.proxy.mend()
    assert mission.over(run) == "Complete"
    assert mission.head(run)["epoch"] == 1


def test_of_two_attempts_at_once_one_is_fenced(mission: Mission) -> None:
    """A second pod of the same Job takes the run over; the first ends with 76, which is ignored."""
    run = mission.submit("twins", steps=300)
    mission.checkpoint_after(run, 0)
    [pod] = mission.pods(run)
    uid = mission.job(run)["metadata"]["uid"]
    mission.copy_of_pod(pod, "twin", uid)
    assert mission.exit_code(pod["metadata"]["name"]) == 76
    # The Job starts a third: it fences the twin in its turn, or comes after it had published.
    assert mission.exit_code("twin") in (0, 76)
    assert mission.over(run) == "Complete"
    assert not mission.job(run)["status"].get("failed")
    assert _versions(mission, "twins") == {mission.receipt(run)["version"]}


def test_a_foreign_job_of_a_living_run_is_refused(mission: Mission) -> None:
    """Another owner's pod of the same run id ends with 73 and changes nothing."""
    run = mission.submit("mine", steps=4000)
    mission.checkpoint_after(run, 0)
    [pod] = mission.pods(run)
    mission.copy_of_pod(pod, "foreign", "another-uid")
    assert mission.exit_code("foreign") == 73
    assert mission.head(run)["epoch"] == 1
    mission.types("cancel", run, "--now", "-n", mission.namespace)


def test_no_progress_is_an_end(mission: Mission) -> None:
    """Two attempts that vanish at the same place without a word: the third says 72 and stops."""
    # Both are killed before their first step is over.
    run = mission.submit("stuck", steps=40, train={"gradient_accumulation": 4000})
    for epoch in (1, 2):
        mission.until(run, lambda head, epoch=epoch: _trains(head, epoch))
        pod = mission.pods(run)[-1]["metadata"]["name"]
        mission.machine.kill(mission.namespace, pod)
        mission.exit_code(pod)
    assert mission.over(run) == "PodFailurePolicy"
    assert mission.exit_code(mission.pods(run)[-1]["metadata"]["name"]) == 72
    assert mission.ask("why", run)["cause"] == "exit-72"


def _trains(head: dict[str, Any], epoch: int) -> bool:
    return bool(head.get("epoch") == epoch and head["progress"].get("stage") == "train")


def test_a_night_fires_and_a_second_fire_of_its_time_is_the_same_run(mission: Mission) -> None:
    """The CronJob's Job has the minute in its name: created again, it verifies and publishes nothing."""
    job, cluster = mission.files("night", steps=10)
    mission.types("schedule", job, "--cluster", cluster, "--cron", "* * * * *")
    plane, jobs = mission.machine.plane, f"{BATCH.format(mission.namespace)}/jobs"
    [fired] = plane.wait(jobs, lambda found: found[:1], within_s=150)
    mission.types("schedule", "night", "--suspend", "-n", mission.namespace)
    run = fired["metadata"]["name"]
    assert mission.over(run) == "Complete"
    receipt = mission.receipt(run)

    plane.delete(f"{jobs}/{run}")
    plane.wait(f"{CORE.format(mission.namespace)}/pods", lambda pods: not pods)
    template = plane.get(f"{BATCH.format(mission.namespace)}/cronjobs/night")["spec"]["jobTemplate"]
    metadata = {**template["metadata"], "name": run}
    plane.create(jobs, {"metadata": metadata, "spec": template["spec"]})
    assert mission.over(run) == "Complete"
    assert mission.receipt(run) == receipt
    assert _versions(mission, "night") == {receipt["version"]}


def _versions(mission: Mission, name: str) -> set[str]:
    keys = mission.s3.names(mission.store, f"{name}/versions/")
    return {key.split("/versions/")[1].split("/")[0] for key in keys}


def test_a_second_gpu_job_waits_and_cancel_keeps_a_checkpoint(mission: Mission) -> None:
    """`why` names who holds the GPU; after cancel the run goes on from its checkpoint."""
    first = mission.apply("first", steps=4000, gpus=1)
    step = mission.checkpoint_after(first, 0)
    second = mission.apply("second", steps=10, gpus=1)
    mission.unschedulable(second)
    why = mission.ask("why", second)
    assert why["cause"] == "gpus"
    assert first in str(why)

    mission.types("cancel", first, "-n", mission.namespace)
    kept = mission.head(first)
    assert kept["ends"][-1]["code"] == 75
    assert kept["checkpoint"]["step"] > step
    assert mission.over(second) == "Complete"

    again = mission.submit("first", steps=4000)
    assert again == first
    mission.until(first, lambda head: head["epoch"] == 2)
    assert mission.checkpoint_after(first, kept["checkpoint"]["step"])
    mission.types("cancel", first, "--now", "-n", mission.namespace)
