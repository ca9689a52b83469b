"""Schemas of the objects beyond Kubernetes' own that the chart makes: closed, and with the fields that it uses only.

The packages of their validators check types, but let unknown names pass, which an API server drops without a word. Of
DisaggregatedSet and LeaderWorkerSet (kubernetes-sigs/lws), and of InferencePool (gateway-api-inference-extension), no
package is there. Written from the reference of each API.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
ANYTHING: Schema = {}


def closed(required: tuple[str, ...] = (), /, **fields: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": fields, "required": list(required)}


def several(item: Schema, at_least: int = 1) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _object(spec: Schema) -> Schema:
    metadata = closed(("name", "namespace", "labels"), name=TEXT, namespace=TEXT, labels=TEXTS)
    return closed(("apiVersion", "kind", "metadata", "spec"), apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)


_POLICIES = several(closed(("type", "value", "periodSeconds"), type=TEXT, value=COUNT, periodSeconds=COUNT))
_RULES = closed(("policies",), stabilizationWindowSeconds=COUNT, policies=_POLICIES)
_BEHAVIOR = closed(scaleUp=_RULES, scaleDown=_RULES)
_RULE = closed(
    ("alert", "expr", "labels", "annotations"),
    **{"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS},
)
_BACKEND = closed(("name",), group=TEXT, kind=TEXT, name=TEXT, port=PORT)
_GROUPS = closed(
    ("leaderWorkerTemplate",),
    replicas=COUNT,
    rolloutStrategy=closed(
        type=one_of("RollingUpdate"), rollingUpdateConfiguration=closed(maxSurge=COUNT, maxUnavailable=COUNT)
    ),
    # The pod templates are checked as Kubernetes' own.
    leaderWorkerTemplate=closed(
        ("size", "workerTemplate"),
        size=COUNT,
        restartPolicy=one_of("None", "RecreateGroupOnPodRestart"),
        leaderTemplate=ANYTHING,
        workerTemplate=ANYTHING,
    ),
)
_ROLE = closed(("name", "spec"), name=one_of("prefill", "decode"), spec={**_GROUPS, "required": ["replicas"]})

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        closed(
            ("scaleTargetRef", "triggers"),
            scaleTargetRef=closed(("name",), apiVersion=TEXT, kind=TEXT, name=TEXT),
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            pollingInterval=COUNT,
            fallback=closed(
                ("failureThreshold", "replicas"),
                failureThreshold=COUNT,
                replicas=COUNT,
                behavior=one_of("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
            ),
            advanced=closed(horizontalPodAutoscalerConfig=closed(behavior=_BEHAVIOR)),
            triggers=several(
                closed(
                    ("type", "metricType", "metadata"),
                    type=one_of("prometheus"),
                    metricType=one_of("AverageValue"),
                    metadata=closed(
                        ("serverAddress", "query", "threshold"),
                        serverAddress=TEXT,
                        query=TEXT,
                        threshold={"type": "string", "pattern": "^[0-9]+$"},
                    ),
                    authenticationRef=closed(("name",), name=TEXT),
                )
            ),
        )
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _object(
        closed(
            ("selector", "endpoints"),
            jobLabel=TEXT,
            namespaceSelector=closed(matchNames=several(TEXT)),
            selector=closed(matchLabels=TEXTS),
            endpoints=several(
                closed(
                    ("port", "path"),
                    port=TEXT,
                    path=TEXT,
                    interval=TEXT,
                    authorization=closed(("credentials",), credentials=closed(("name", "key"), name=TEXT, key=TEXT)),
                )
            ),
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        closed(("groups",), groups=several(closed(("name", "rules"), name=TEXT, rules=several(_RULE))))
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        closed(
            ("parentRefs", "rules"),
            parentRefs=several(closed(("name",), name=TEXT, namespace=TEXT, sectionName=TEXT)),
            hostnames=several(TEXT),
            rules=several(
                closed(
                    ("matches", "backendRefs"),
                    matches=several(closed(path=closed(("type", "value"), type=one_of("PathPrefix"), value=TEXT))),
                    timeouts=closed(request=TEXT),
                    backendRefs=several(_BACKEND),
                )
            ),
        )
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        closed(
            ("selector", "targetPorts", "endpointPickerRef"),
            selector=closed(("matchLabels",), matchLabels=TEXTS),
            targetPorts={**several(closed(("number",), number=PORT)), "maxItems": 8},
            endpointPickerRef=closed(
                ("name", "port"),
                name=TEXT,
                port=closed(("number",), number=PORT),
                failureMode=one_of("FailOpen", "FailClose"),
            ),
        )
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _object(_GROUPS),
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): _object(
        closed(("roles",), roles={**several(_ROLE, at_least=2), "maxItems": 10})
    ),
}
