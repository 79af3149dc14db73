"""What every manifest of ours promises: locked-down pods, bounded resources, pinned images, closed networks."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import LOW_LATENCY
from reft_ray.serving.manifests import JOB_SERVER, RAY_VERSION

Document = dict[str, Any]
ROOT = Path(__file__).parents[2]
Pods = list[tuple[str, Document]]
PINNED = re.compile(r"^[a-z0-9./-]+:\d+\.\d+\.\d+(-[a-z]+)?$")


def containers(pods: Pods) -> list[tuple[str, Document]]:
    return [(place, item) for place, template in pods for item in template["spec"]["containers"]]


def autoscalers(documents: list[tuple[str, Document]]) -> list[tuple[str, Document]]:
    found = []
    for place, document in documents:
        spec = document.get("spec", {})
        cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
        if "autoscalerOptions" in cluster:
            found.append((f"{place} autoscaler", cluster["autoscalerOptions"]))
    return found


def test_images_are_pinned_to_a_version(all_pods: Pods) -> None:
    images = {item["image"] for _, item in containers(all_pods)}
    assert images == {"ghcr.io/reft-ray/reft-ray:0.1.0", "ghcr.io/reft-ray/reft-ray:0.1.0-cuda"}
    assert all(PINNED.match(image) for image in images)


def test_containers_are_locked_down(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    checked = [*containers(all_pods), *autoscalers(all_documents)]
    assert len(checked) > 15
    for place, container in checked:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, place
        assert security["readOnlyRootFilesystem"] is True, place
        assert security["runAsNonRoot"] is True, place
        assert security["capabilities"] == {"drop": ["ALL"]}, place
        assert not security.get("privileged"), place


def test_requests_go_the_same_short_way_as_on_one_machine() -> None:
    pods = yaml.safe_load((ROOT / "cluster" / "templates" / "pods.yaml").read_text())
    environment = {item["name"]: item["value"] for item in pods["container"]["env"]}
    assert environment.items() >= LOW_LATENCY.items()


def test_pods_are_locked_down(all_pods: Pods) -> None:
    for place, template in all_pods:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, place
        assert spec["securityContext"]["runAsUser"] > 0, place
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert spec["automountServiceAccountToken"] is False, place
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), place
        assert not any("hostPath" in volume for volume in spec["volumes"]), place
        # What is written must have a place, for the root file system is read-only.
        mounts = {mount["mountPath"] for item in spec["containers"] for mount in item["volumeMounts"]}
        assert {"/tmp", "/dev/shm"} <= mounts, place


def test_only_the_autoscaler_holds_a_token(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    assert not any("api-token" in {m["name"] for m in item["volumeMounts"]} for _, item in containers(all_pods))
    for place, options in autoscalers(all_documents):
        assert "api-token" in {mount["name"] for mount in options["volumeMounts"]}, place


def test_requests_are_limits(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    for place, container in [*containers(all_pods), *autoscalers(all_documents)]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], place
        assert {"cpu", "memory"} <= resources["limits"].keys(), place


def test_the_object_store_fits_into_its_memory(all_documents: list[tuple[str, Document]]) -> None:
    seen = 0
    for place, document in all_documents:
        for params, template in _ray_pods(document):
            store = int(params["object-store-memory"])
            shared = next(v for v in template["spec"]["volumes"] if v["name"] == "shared-mem")["emptyDir"]
            memory = _bytes(template["spec"]["containers"][0]["resources"]["limits"]["memory"])
            assert shared["medium"] == "Memory"
            assert store <= _bytes(shared["sizeLimit"]) <= memory / 2, place
            seen += 1
    assert seen > 10


def test_the_head_runs_no_work(all_documents: list[tuple[str, Document]]) -> None:
    for place, cluster in _clusters(all_documents):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", place
        assert cluster["rayVersion"] == RAY_VERSION, place
        assert cluster["authOptions"] == {"mode": "token", "secretName": "reft-ray-auth"}, place


def test_every_ray_container_is_probed_and_drained(all_pods: Pods) -> None:
    rays = [(place, item) for place, item in containers(all_pods) if item["name"] in ("ray", "ray-head")]
    for place, item in rays:
        assert {"livenessProbe", "readinessProbe"} <= item.keys(), place
        assert "preStop" in item["lifecycle"], place
    for place, template in all_pods:
        (item,) = template["spec"]["containers"]
        if "lifecycle" in item:
            command = item["lifecycle"]["preStop"]["exec"]["command"][-1]
            seconds = sum(map(int, re.findall(r"sleep (\d+)", command)))
            assert seconds + 30 <= template["spec"]["terminationGracePeriodSeconds"], place


def test_spot_machines_only_train(all_documents: list[tuple[str, Document]]) -> None:
    spots = {
        (document["kind"], document["metadata"]["name"])
        for place, document in all_documents
        for _, cluster in _clusters([(place, document)])
        for group in cluster["workerGroupSpecs"]
        if "spot" in group["groupName"]
    }
    assert spots == {("RayJob", "finetuning")}


def test_a_job_starts_its_driver_off_the_head_and_off_spot(manifests: Any) -> None:
    for part in ("jobs/finetuning", "jobs/screening"):
        spec = manifests.one(part, "RayJob")["spec"]
        assert spec["entrypointResources"] == '{"on_demand": 1}'
        groups = spec["rayClusterSpec"]["workerGroupSpecs"]
        assert [g["groupName"] for g in groups if "on_demand" in g.get("resources", {})] == ["gpu"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["backoffLimit"] > 0


def test_networks_are_closed_by_default(manifests: Any, overlay: str) -> None:
    policies = [d for d in manifests.build(overlay) if d["kind"] == "NetworkPolicy"]
    (default,) = (d["spec"] for d in policies if d["metadata"]["name"] == "deny-all")
    assert default == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies:
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            peers = rule.get("from") or rule.get("to")
            assert peers, f"{policy['metadata']['name']} is open to everybody"
            assert all(peer != {} for peer in peers)
            if any("podSelector" not in peer for peer in peers):
                assert rule.get("ports"), f"{policy['metadata']['name']} opens every port"


def test_selectors_find_pods(manifests: Any, overlay: str) -> None:
    """A selector with a slip of the pen selects nothing, and nobody would tell."""
    documents = manifests.build(overlay)
    roles = {template["metadata"]["labels"]["reft-ray.io/role"] for d in documents for _, template in _ray_pods(d)}
    assert roles == {"service"}
    known = {"service", "job", "interactive"}
    kinds = ("PodDisruptionBudget", "NetworkPolicy")
    for document in documents:
        if document["kind"] in kinds:
            key = "podSelector" if document["kind"] == "NetworkPolicy" else "selector"
            role = document["spec"][key].get("matchLabels", {}).get("reft-ray.io/role")
            assert role is None or role in known, document["metadata"]["name"]
    classes = {d["metadata"]["name"] for d in documents if d["kind"] == "PriorityClass"}
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for document in documents:
        for _, template in _ray_pods(document):
            assert template["spec"]["priorityClassName"] in classes
            volumes = [
                v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"] if "artefacts" in v["name"]
            ]
            assert set(volumes) <= claims


def test_no_budget_stops_a_drain_for_ever(manifests: Any, overlay: str) -> None:
    """More than 0 unavailable, or a share, is counted from a scale; a RayCluster has none, so that nothing may go."""
    documents = manifests.build(overlay)
    budgets = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"}
    job_heads = budgets.pop("job-heads")
    # A job ends, so its pods may be held for as long as it runs.
    assert {"key": "reft-ray.io/role", "operator": "In", "values": ["job"]} in job_heads["selector"]["matchExpressions"]
    assert job_heads["maxUnavailable"] == 0
    busy = _workers_with_a_replica(manifests.one(overlay, "RayService")["spec"])
    for name, spec in budgets.items():
        assert "maxUnavailable" not in spec, name
        assert isinstance(spec["minAvailable"], int), name
        assert spec["minAvailable"] < busy, f"{name}: {busy} workers become ready for certain"
    # Where there are two, the last one stays.
    assert sorted(budgets) == (["service-workers"] if busy > 1 else [])


def test_no_secret_is_written_down(all_documents: list[tuple[str, Document]]) -> None:
    assert not [place for place, document in all_documents if document["kind"] == "Secret"]
    for place, template in [(p, t) for p, d in all_documents for _, t in _ray_pods(d)]:
        for container in template["spec"]["containers"]:
            named = [
                e["name"]
                for e in container["env"]
                if re.search("PASSWORD|TOKEN$|SECRET|KEY", e["name"]) and "value" in e
            ]
            assert named == [], place
    redis = [c["gcsFaultToleranceOptions"] for _, c in _clusters(all_documents) if "gcsFaultToleranceOptions" in c]
    assert [list(options["redisPassword"]) for options in redis] == [["valueFrom"]] * 2


def test_what_the_finetuning_service_names_is_there(manifests: Any) -> None:
    """Variables, the job server and the metrics token: each is written in one place and named in another."""
    service = manifests.one("overlays/finetuning", "RayService")
    secrets = [
        {source["secretRef"]["name"] for source in template["spec"]["containers"][0]["envFrom"]}
        for _, template in _ray_pods(service)
    ]
    # Gateways, replicas and drivers run on workers; the head builds the application.
    assert len(secrets) == 3
    assert all("reft-ray-service" in names for names in secrets)
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    args = ServeArgs.of(application["args"])
    assert args.service is not None
    assert args.service.database_url == "env:REFT_DATABASE"
    assert args.service.job_server == JOB_SERVER
    assert f"//{service['metadata']['name']}-head-svc:" in JOB_SERVER
    assert args.service.driver_cpus > 0, "the head has no processors for drivers"
    assert args.service.require_keys
    endpoints = manifests.one("overlays/finetuning", "PodMonitor")["spec"]["podMetricsEndpoints"]
    (named,) = [endpoint["authorization"]["credentials"] for endpoint in endpoints if "authorization" in endpoint]
    assert named == {"name": "reft-ray-service", "key": args.metrics_token_variable}
    plain = manifests.one("overlays/production", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert not [endpoint for endpoint in plain if "authorization" in endpoint]


def test_prometheus_finds_the_pods_and_names_them(manifests: Any) -> None:
    monitor = manifests.one("overlays/production", "PodMonitor")
    # ReftTargetDown watches jobs with this in their name, which is the monitor's.
    assert "reft" in monitor["metadata"]["name"]
    (template,) = [
        t for d in manifests.build("overlays/production") for p, t in _ray_pods(d) if p.get("num-cpus") == "0"
    ]
    selector = monitor["spec"]["selector"]["matchLabels"]
    # KubeRay adds this one to every pod of a Ray cluster.
    assert selector.pop("ray.io/is-ray-node") == "yes"
    assert selector.items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint["port"] in ports
        assert "cluster" in {rule.get("targetLabel") for rule in endpoint["relabelings"]}


def test_prometheus_asks_only_proxies_that_run_for_the_gateways_figures(manifests: Any) -> None:
    """Serve runs its proxy on a service's head and beside replicas: any other target would be down for ever."""
    endpoints = manifests.one("overlays/production", "PodMonitor")["spec"]["podMetricsEndpoints"]
    for part in ("overlays/production", "jobs/finetuning", "jobs/screening", "interactive"):
        for template in (template for d in manifests.build(part) for _, template in _ray_pods(d)):
            (container,) = template["spec"]["containers"]
            probes = container["readinessProbe"]["httpGet"]["path"]
            head = container["name"] == "ray-head"
            for ready in (True, False):
                targets = {item["port"] for item in endpoints if _is_target(item, template, ready)}
                # A worker of a service is ready while its proxy is.
                runs = part == "overlays/production" and (head or probes == "/-/healthz")
                assert ("serve" in targets) == (runs and ready), (part, container["name"], ready)
                assert "metrics" in targets


def test_a_replica_fits_on_a_pod(manifests: Any, overlay: str) -> None:
    """Serve would wait for ever for a node that the pods of an overlay can never be."""
    service = manifests.one(overlay, "RayService")["spec"]
    limits = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in service["rayClusterConfig"]["workerGroupSpecs"]
        if group["maxReplicas"]
    ]
    for application in yaml.safe_load(service["serveConfigV2"])["applications"]:
        for deployment in application["deployments"]:
            asked = deployment["ray_actor_options"]
            assert any(
                asked.get("num_cpus", 1) <= float(size["cpu"])
                and asked.get("num_gpus", 0) <= float(size.get("nvidia.com/gpu", 0))
                for size in limits
            ), deployment["name"]


def test_kueue_queues_jobs(all_documents: list[tuple[str, Document]]) -> None:
    queued = [document for place, document in all_documents if place.endswith("+kueue")]
    assert len(queued) == 2
    for document in queued:
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "reft-ray"
        assert document["spec"]["suspend"] is True
        assert "enableInTreeAutoscaling" not in document["spec"]["rayClusterSpec"]


def test_a_job_has_the_pods_that_it_asks_for(all_documents: list[tuple[str, Document]]) -> None:
    """Driver, workers and actors find their places at once: Ray would wait for ever for what never comes."""
    jobs = [(place, document["spec"]) for place, document in all_documents if document["kind"] == "RayJob"]
    assert len(jobs) == 4
    for place, spec in jobs:
        cluster = spec["rayClusterSpec"]
        pods = "maxReplicas" if cluster.get("enableInTreeAutoscaling") else "replicas"
        free = []
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], place
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            size = {"cpu": float(limits["cpu"]), "gpu": float(limits["nvidia.com/gpu"])}
            own = {name: float(amount) for name, amount in group.get("resources", {}).items()}
            free += [{**size, **own} for _ in range(group[pods])]
        for asked in _places(spec):
            pod = next((pod for pod in free if all(pod.get(name, 0) >= n for name, n in asked.items())), None)
            assert pod is not None, f"{place}: {pods} leave no place for {asked}"
            for name, amount in asked.items():
                pod[name] = pod.get(name, 0) - amount


def _places(spec: Document) -> list[dict[str, float]]:
    """What a job's driver, and then each of its workers or actors, takes of one pod."""
    words = shlex.split(spec["entrypoint"])
    options = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    driver = {
        "cpu": float(spec["entrypointNumCpus"]),
        "gpu": float(spec.get("entrypointNumGpus", 0)),
        **json.loads(spec["entrypointResources"]),
    }
    many, cpus, gpus = {
        "finetune": ("--workers", "--cpus-per-worker", "--gpus-per-worker"),
        "screen": ("--actors", "--cpus", "--gpus"),
    }[words[1]]
    each = {"cpu": float(options[cpus]), "gpu": float(options[gpus])}
    return [driver] + [each] * int(options[many])


def _clusters(documents: list[tuple[str, Document]]) -> list[tuple[str, Document]]:
    found = []
    for place, document in documents:
        spec = document.get("spec", {})
        cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
        if "headGroupSpec" in cluster:
            found.append((place, cluster))
    return found


def _ray_pods(document: Document) -> list[tuple[Document, Document]]:
    """Start parameters and pod template of the head and of every worker group."""
    groups = [g for _, c in _clusters([("", document)]) for g in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    return [(group["rayStartParams"], group["template"]) for group in groups]


def _is_target(endpoint: Document, template: Document, ready: bool) -> bool:
    """Whether a pod passes an endpoint's `keep` rules, under the labels that Prometheus' discovery makes of it."""
    labels = {"__meta_kubernetes_pod_ready": str(ready).lower()} | {
        "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", name): value
        for name, value in template["metadata"]["labels"].items()
    }
    return all(
        re.fullmatch(rule["regex"], ";".join(labels.get(name, "") for name in rule["sourceLabels"]))
        for rule in endpoint["relabelings"]
        if rule["action"] == "keep"
    )


def _workers_with_a_replica(service: Document) -> int:
    """How many workers hold a replica wherever Serve puts them: only these are ready, and counted by a budget."""
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    asked = sum(
        deployment["ray_actor_options"].get("num_gpus", 0)
        * deployment.get("autoscaling_config", {}).get("min_replicas", deployment.get("num_replicas", 1))
        for deployment in application["deployments"]
    )
    per_worker = max(
        float(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 1))
        for group in service["rayClusterConfig"]["workerGroupSpecs"]
    )
    return max(1, math.ceil(asked / per_worker))


def _bytes(quantity: str) -> int:
    units = {"Ki": 10, "Mi": 20, "Gi": 30}
    return int(quantity[:-2]) << units[quantity[-2:]]
