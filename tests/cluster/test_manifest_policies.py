"""Policies for every manifest: restricted pods, resource limits, pinned images, default-deny networks."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from reft_ray.serving import LOW_LATENCY
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.manifests import JOB_SERVER, RAY_VERSION

Document = dict[str, Any]
ROOT = Path(__file__).parents[2]
Pods = list[tuple[str, Document]]
PINNED = re.compile(r"^[a-z0-9./-]+:(\d+\.\d+(\.\d+)?(-[a-z]+)?|RELEASE\.[0-9TZ-]+)$")


def containers(pods: Pods) -> list[tuple[str, Document]]:
    return [(location, item) for location, template in pods for item in template["spec"]["containers"]]


def autoscalers(documents: list[tuple[str, Document]]) -> list[tuple[str, Document]]:
    clusters = _clusters(documents)
    return [(f"{at} autoscaler", made["autoscalerOptions"]) for at, made in clusters if "autoscalerOptions" in made]


def test_images_are_pinned_to_a_version(all_pods: Pods) -> None:
    images = {item["image"] for _, item in containers(all_pods)}
    assert {name.rpartition(":")[0] for name in images} == {
        "ghcr.io/reft-ray/reft-ray",
        "docker.io/library/postgres",
        "docker.io/library/redis",
        "quay.io/minio/minio",
    }
    ours = {name for name in images if "reft-ray" in name}
    assert ours == {f"ghcr.io/reft-ray/reft-ray:0.1.0{suffix}" for suffix in ("", "-cuda", "-vllm")}
    assert all(PINNED.match(image) for image in images)


def test_containers_are_restricted(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    checked = [*containers(all_pods), *autoscalers(all_documents)]
    assert len(checked) > 15
    for location, container in checked:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, location
        assert security["readOnlyRootFilesystem"] is True, location
        assert security["runAsNonRoot"] is True, location
        assert security["capabilities"] == {"drop": ["ALL"]}, location
        assert not security.get("privileged"), location


def test_serve_settings_equal_those_of_one_machine() -> None:
    pods = yaml.safe_load((ROOT / "cluster" / "templates" / "pods.yaml").read_text())
    environment = {item["name"]: item["value"] for item in pods["container"]["env"]}
    assert environment.items() >= LOW_LATENCY.items()


def test_pods_are_restricted(all_pods: Pods) -> None:
    for location, template in all_pods:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, location
        assert spec["securityContext"]["runAsUser"] > 0, location
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, location
        assert spec["automountServiceAccountToken"] is False, location
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), location
        assert not any("hostPath" in volume for volume in spec["volumes"]), location
        # The root file system is read-only: writable paths need volumes.
        mounts = {mount["mountPath"] for item in spec["containers"] for mount in item["volumeMounts"]}
        assert {"/tmp", "/dev/shm"} <= mounts, location


def test_only_the_autoscaler_holds_a_token(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    assert not any("api-token" in {m["name"] for m in item["volumeMounts"]} for _, item in containers(all_pods))
    for location, options in autoscalers(all_documents):
        assert "api-token" in {mount["name"] for mount in options["volumeMounts"]}, location


def test_requests_equal_limits(all_pods: Pods, all_documents: list[tuple[str, Document]]) -> None:
    for location, container in [*containers(all_pods), *autoscalers(all_documents)]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], location
        assert {"cpu", "memory"} <= resources["limits"].keys(), location


def test_the_object_store_fits_into_its_memory(all_documents: list[tuple[str, Document]]) -> None:
    seen = 0
    for location, document in all_documents:
        for params, template in _ray_pods(document):
            store = int(params["object-store-memory"])
            shared = next(v for v in template["spec"]["volumes"] if v["name"] == "shared-mem")["emptyDir"]
            memory = _bytes(template["spec"]["containers"][0]["resources"]["limits"]["memory"])
            assert shared["medium"] == "Memory"
            assert store <= _bytes(shared["sizeLimit"]) <= memory / 2, location
            seen += 1
    assert seen > 10


def test_the_head_has_no_cpus_for_work(all_documents: list[tuple[str, Document]]) -> None:
    for location, cluster in _clusters(all_documents):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", location
        assert cluster["rayVersion"] == RAY_VERSION, location
        assert cluster["authOptions"] == {"mode": "token", "secretName": "reft-ray-auth"}, location


def test_every_ray_container_is_probed_and_drained(all_pods: Pods) -> None:
    rays = [(location, item) for location, item in containers(all_pods) if item["name"] in ("ray", "ray-head")]
    for location, item in rays:
        assert {"livenessProbe", "readinessProbe"} <= item.keys(), location
        assert "preStop" in item["lifecycle"], location
    for location, template in all_pods:
        (item,) = template["spec"]["containers"]
        if "lifecycle" in item:
            command = item["lifecycle"]["preStop"]["exec"]["command"][-1]
            seconds = sum(map(int, re.findall(r"sleep (\d+)", command)))
            assert seconds + 30 <= template["spec"]["terminationGracePeriodSeconds"], location


def test_only_finetuning_uses_spot_nodes(all_documents: list[tuple[str, Document]]) -> None:
    spots = {
        (document["kind"], document["metadata"]["name"])
        for location, document in all_documents
        for _, cluster in _clusters([(location, document)])
        for group in cluster["workerGroupSpecs"]
        if "spot" in group["groupName"]
    }
    assert spots == {("RayJob", "finetuning")}


def test_job_drivers_run_on_on_demand_workers(manifests: Any) -> None:
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
            assert peers, f"{policy['metadata']['name']} is open to all peers"
            assert all(peer != {} for peer in peers)
            if any("podSelector" not in peer for peer in peers):
                assert rule.get("ports"), f"{policy['metadata']['name']} opens every port"


def test_selectors_match_pods(manifests: Any, overlay: str) -> None:
    """A selector with a typo selects nothing, without an error."""
    documents = manifests.build(overlay)
    roles = {template["metadata"]["labels"]["reft-ray.io/role"] for d in documents for _, template in _ray_pods(d)}
    assert roles == {"service"}
    known = {"service", "job", "interactive", "vllm"}
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


def test_no_disruption_budget_blocks_a_drain_for_ever(manifests: Any, overlay: str) -> None:
    """maxUnavailable and percentages need a scale, which a RayCluster does not have, so no pod could be evicted."""
    documents = manifests.build(overlay)
    budgets = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"}
    job_heads = budgets.pop("job-heads")
    # Jobs end, so their pods may be protected while they run.
    assert {"key": "reft-ray.io/role", "operator": "In", "values": ["job"]} in job_heads["selector"]["matchExpressions"]
    assert job_heads["maxUnavailable"] == 0
    busy = _workers_with_a_replica(manifests.one(overlay, "RayService")["spec"])
    for name, spec in budgets.items():
        assert "maxUnavailable" not in spec, name
        assert isinstance(spec["minAvailable"], int), name
        assert spec["minAvailable"] < busy, f"{name}: {busy} workers always have a replica"
    # With two workers, the last one is protected.
    assert sorted(budgets) == (["service-workers"] if busy > 1 else [])


def test_no_manifest_contains_a_secret(all_documents: list[tuple[str, Document]]) -> None:
    assert not [location for location, document in all_documents if document["kind"] == "Secret"]
    for location, template in [(p, t) for p, d in all_documents for _, t in _ray_pods(d)]:
        for container in template["spec"]["containers"]:
            named = [
                e["name"]
                for e in container["env"]
                if re.search("PASSWORD|TOKEN$|SECRET|KEY", e["name"]) and "value" in e
            ]
            assert named == [], location
    redis = [c["gcsFaultToleranceOptions"] for _, c in _clusters(all_documents) if "gcsFaultToleranceOptions" in c]
    assert [list(options["redisPassword"]) for options in redis] == [["valueFrom"]] * 3


def test_references_of_the_finetuning_service_resolve(manifests: Any) -> None:
    """Environment variables, the job server and the metrics token are defined in another manifest."""
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
    assert args.service.driver_cpus > 0, "the head has no CPUs for drivers"
    assert args.service.require_keys
    endpoints = manifests.one("overlays/finetuning", "PodMonitor")["spec"]["podMetricsEndpoints"]
    (named,) = [endpoint["authorization"]["credentials"] for endpoint in endpoints if "authorization" in endpoint]
    assert named == {"name": "reft-ray-service", "key": args.metrics_token_variable}
    plain = manifests.one("overlays/production", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert not [endpoint for endpoint in plain if "authorization" in endpoint]


def test_the_pod_monitor_selects_and_labels_pods(manifests: Any) -> None:
    monitor = manifests.one("overlays/production", "PodMonitor")
    # ReftTargetDown selects jobs with this in their name.
    assert "reft" in monitor["metadata"]["name"]
    (template,) = [
        t for d in manifests.build("overlays/production") for p, t in _ray_pods(d) if p.get("num-cpus") == "0"
    ]
    selector = monitor["spec"]["selector"]["matchLabels"]
    # KubeRay adds this label to every Ray pod.
    assert selector.pop("ray.io/is-ray-node") == "yes"
    assert selector.items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint["port"] in ports
        targets = {rule.get("targetLabel") for rule in endpoint["relabelings"]}
        assert "ray_io_cluster" in targets
        assert "cluster" not in targets, "`cluster` is the Kubernetes cluster"


def test_only_running_proxies_are_targets_for_gateway_metrics(manifests: Any) -> None:
    """Serve runs proxies on the head and on nodes with replicas: any other target would always be down."""
    endpoints = manifests.one("overlays/production", "PodMonitor")["spec"]["podMetricsEndpoints"]
    for part in ("overlays/production", "jobs/finetuning", "jobs/screening", "interactive"):
        for template in (template for d in manifests.build(part) for _, template in _ray_pods(d)):
            (container,) = template["spec"]["containers"]
            probes = container["readinessProbe"]["httpGet"]["path"]
            head = container["name"] == "ray-head"
            for ready in (True, False):
                targets = {item["port"] for item in endpoints if _is_target(item, template, ready)}
                # A worker of a service is ready if its proxy is.
                runs = part == "overlays/production" and (head or probes == "/-/healthz")
                assert ("serve" in targets) == (runs and ready), (part, container["name"], ready)
                assert "metrics" in targets


def test_a_replica_fits_on_a_pod(manifests: Any, overlay: str) -> None:
    """Otherwise Serve would wait for ever for a node."""
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


def test_vllm_is_reached_by_gateways_alone(manifests: Any) -> None:
    """It asks for no keys and moderates nothing: a second application on the clients' port would be open to them."""
    documents = manifests.build("vllm")
    inbound = [rule for d in documents if d["kind"] == "NetworkPolicy" for rule in d["spec"].get("ingress", ())]
    peers = [peer["podSelector"]["matchLabels"]["reft-ray.io/role"] for rule in inbound for peer in rule["from"]]
    assert sorted(peers) == ["service", "vllm"]
    config = yaml.safe_load(manifests.one("vllm", "RayService")["spec"]["serveConfigV2"])
    (model,) = config["applications"][0]["args"]["llm_configs"]
    service = yaml.safe_load((ROOT / "serve_configs" / "service.yaml").read_text())["applications"][0]["args"][
        "service"
    ]
    name = model["model_loading_config"]["model_id"]
    assert model["model_loading_config"]["model_source"] == service["base_models"][name]["uri"]
    assert model["lora_config"]["dynamic_lora_loading_path"] == service["files_uri"]


def test_kueue_queues_jobs(all_documents: list[tuple[str, Document]]) -> None:
    queued = [document for location, document in all_documents if location.endswith("+kueue")]
    assert len(queued) == 2
    for document in queued:
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "reft-ray"
        assert document["spec"]["suspend"] is True
        assert "enableInTreeAutoscaling" not in document["spec"]["rayClusterSpec"]


def test_a_job_fits_on_its_pods(all_documents: list[tuple[str, Document]]) -> None:
    """Driver, workers and actors fit at the same time; otherwise Ray would wait for ever."""
    jobs = [
        (location, document["spec"].get("jobTemplate", document["spec"]))
        for location, document in all_documents
        if document["kind"] in ("RayJob", "RayCronJob")
    ]
    assert len(jobs) == 6
    for location, spec in jobs:
        cluster = spec["rayClusterSpec"]
        pods = "maxReplicas" if cluster.get("enableInTreeAutoscaling") else "replicas"
        free = []
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], location
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            size = {"cpu": float(limits["cpu"]), "gpu": float(limits["nvidia.com/gpu"])}
            custom = {name: float(amount) for name, amount in group.get("resources", {}).items()}
            free += [{**size, **custom} for _ in range(group[pods])]
        for asked in _demands(spec):
            pod = next((pod for pod in free if all(pod.get(name, 0) >= n for name, n in asked.items())), None)
            assert pod is not None, f"{location}: {pods} have no capacity for {asked}"
            for name, amount in asked.items():
                pod[name] = pod.get(name, 0) - amount


def _demands(spec: Document) -> list[dict[str, float]]:
    """Resources of a job's driver and of each of its workers or actors."""
    words = shlex.split(spec["entrypoint"])
    options = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    driver = {
        "cpu": float(spec["entrypointNumCpus"]),
        "gpu": float(spec.get("entrypointNumGpus", 0)),
        **json.loads(spec["entrypointResources"]),
    }
    if words[1:3] == ["teacher", "evaluate"]:
        return [driver]
    many, cpus, gpus = {
        "finetune": ("--workers", "--cpus-per-worker", "--gpus-per-worker"),
        "teacher": ("--workers", "--cpus-per-worker", "--gpus-per-worker"),
        "screen": ("--actors", "--cpus", "--gpus"),
    }[words[1]]
    each = {"cpu": float(options[cpus]), "gpu": float(options[gpus])}
    return [driver] + [each] * int(options[many])


def _clusters(documents: list[tuple[str, Document]]) -> list[tuple[str, Document]]:
    found = []
    for location, document in documents:
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", spec)
        cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
        if "headGroupSpec" in cluster:
            found.append((location, cluster))
    return found


def _ray_pods(document: Document) -> list[tuple[Document, Document]]:
    """ray start parameters and pod template of the head and of every worker group."""
    groups = [g for _, c in _clusters([("", document)]) for g in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    return [(group["rayStartParams"], group["template"]) for group in groups]


def _is_target(endpoint: Document, template: Document, ready: bool) -> bool:
    """Whether a pod passes an endpoint's `keep` rules with the labels of Prometheus' service discovery."""
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
    """Minimum number of workers with a replica, for any placement: only these are ready and count for a budget."""
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
