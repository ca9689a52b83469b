"""The objects that the chart renders fit one another, and have no rights: selectors, budgets, scaling, security."""

from __future__ import annotations

import pytest

from baton.tests.deploy.chart import EXAMPLES, FULLNAME, container, labels, matches, of_kind, pod_templates, render

pytestmark = pytest.mark.deploy


@pytest.mark.parametrize("example", EXAMPLES)
def test_selectors_select_their_own_pods(example: str) -> None:
    """Guards against a workload, a budget or a policy that selects no pods, or those of another."""
    objects = render(example)
    pods = pod_templates(objects)
    for each in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet", "PodDisruptionBudget"):
        component = each["metadata"]["labels"]["app.kubernetes.io/component"]
        selected = [name for name, pod in pods.items() if matches(each["spec"]["selector"]["matchLabels"], labels(pod))]
        assert selected == [component], each["metadata"]["name"]
    for template in pods.values():
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            assert matches(constraint["labelSelector"]["matchLabels"], labels(template))


@pytest.mark.parametrize(
    ("settings", "budgets"),
    [
        ((), {"proxy", "prefill", "decode"}),
        (("prefill.replicas=1",), {"proxy", "decode"}),
        (("proxy.replicas=1", "decode.replicas=0"), {"prefill"}),
        (("autoscaling.enabled=true", "autoscaling.decode.minReplicas=2"), {"proxy", "decode"}),
        (("podDisruptionBudget.enabled=false",), set()),
    ],
)
def test_budgets_never_stop_a_node_from_being_drained(settings: tuple[str, ...], budgets: set[str]) -> None:
    """Guards against a budget for a single pod, which no eviction could ever satisfy."""
    found = of_kind(
        render("disaggregatedset", "workload=deployment", "prefill.replicas=2", *settings), "PodDisruptionBudget"
    )
    assert {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in found} == budgets
    assert all(each["spec"]["maxUnavailable"] == 1 for each in found)


@pytest.mark.parametrize(
    ("example", "kind"),
    [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler"), ("stages", "ScaledObject")],
)
def test_autoscalers_own_the_replicas(example: str, kind: str) -> None:
    """Guards against an upgrade that sets back what an autoscaler has set, and one that scales what does not exist."""
    objects = render(example)
    workers = {each["metadata"]["name"]: each for each in of_kind(objects, "Deployment", "LeaderWorkerSet")}
    scalers = of_kind(objects, kind)
    targets = {each["spec"]["scaleTargetRef"]["name"]: each["spec"]["scaleTargetRef"] for each in scalers}
    assert {name: each["kind"] for name, each in targets.items()} == {name: workers[name]["kind"] for name in workers}
    assert not any("replicas" in each["spec"] for each in workers.values())
    assert of_kind(objects, "StatefulSet")[0]["spec"]["replicas"] == 2
    assert all("replicas" in each["spec"] for each in of_kind(render("gpu"), "Deployment"))


def test_updates_keep_what_serves() -> None:
    """Guards against an update that removes a worker before its successor is there, where there is room for both."""
    by_name = {each["metadata"]["name"]: each["spec"]["strategy"] for each in of_kind(render("gpu"), "Deployment")}
    assert by_name[f"{FULLNAME}-prefill"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert by_name[f"{FULLNAME}-decode"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}  # rollout: replace


@pytest.mark.parametrize("example", EXAMPLES)
def test_pods_have_no_rights(example: str) -> None:
    """Guards against pods that Pod Security's profile `restricted` refuses, and against rights in the cluster."""
    objects = render(example)
    kinds = {each["kind"] for each in objects}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    for each in of_kind(objects, "ServiceAccount"):
        assert each["automountServiceAccountToken"] is False
    for component, template in pod_templates(objects).items():
        spec, process = template["spec"], container(template)["securityContext"]
        assert spec["automountServiceAccountToken"] is False
        identity = spec["securityContext"]
        assert identity["runAsNonRoot"] and identity["runAsUser"] == identity["fsGroup"] == 10001
        assert identity["seccompProfile"] == {"type": "RuntimeDefault"}
        assert process == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostIPC"} & set(spec)
        host_paths = [each for each in spec.get("volumes", []) if "hostPath" in each]
        assert example in ("store", "adaptive") or not host_paths, component  # a disk, and a model


@pytest.mark.parametrize("example", EXAMPLES)
def test_volumes_are_mounted_and_secrets_are_there(example: str) -> None:
    """Guards against a pod that waits for ever for a Secret or a volume that nothing makes."""
    objects = render(example)
    made = {each["metadata"]["name"]: set(each["data"]) for each in of_kind(objects, "Secret")}
    named_by_user = {"baton-cluster", "baton-keys", "baton-tenants", "hub"}
    for template in pod_templates(objects).values():
        volumes = {each["name"]: each for each in template["spec"].get("volumes", [])}
        mounts = container(template).get("volumeMounts", [])
        assert {each["name"] for each in mounts} == set(volumes)
        assert len({each["mountPath"] for each in mounts}) == len(mounts)
        for volume in volumes.values():
            if (secret := volume.get("secret")) is not None:
                assert secret["defaultMode"] == 0o440  # the group may read it, others may not: else the node refuses it
                keys = {each["key"] for each in secret["items"]}
                assert secret["secretName"] in named_by_user or keys <= made[secret["secretName"]]


def test_the_network_is_closed_but_for_the_api() -> None:
    """Guards against control and KV ports that pods of others reach, and against links of the release that are cut."""
    objects = render("gateway")
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "NetworkPolicy")}
    release, api = policies[FULLNAME], policies[f"{FULLNAME}-api"]
    own = release["podSelector"]["matchLabels"]
    assert all(matches(own, labels(each)) for each in pod_templates(objects).values())
    assert release["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    assert [each["port"] for rule in api["ingress"] for each in rule["ports"]] == ["http"]
    assert len(api["ingress"][0]["from"]) == 2  # the gateway's namespace, and that of Prometheus
    assert api["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "proxy"
    open_to_all = {each["metadata"]["name"]: each["spec"] for each in of_kind(render("gpu"), "NetworkPolicy")}
    assert "from" not in open_to_all[f"{FULLNAME}-api"]["ingress"][0]


def test_adaptive_roles_are_one_deployment() -> None:
    """Guards against prefill workers beside mixed ones, which exchange KV only with one another."""
    objects = render("adaptive")
    (workers,) = of_kind(objects, "Deployment")
    assert workers["metadata"]["name"] == f"{FULLNAME}-mixed"
    template = workers["spec"]["template"]
    assert labels(template)["llm-d.ai/role"] == "prefill-decode" and "--mixed" in container(template)["args"]
    (scaler,) = of_kind(objects, "ScaledObject")
    assert all('role="mixed"' in each["metadata"]["query"] for each in scaler["spec"]["triggers"])
