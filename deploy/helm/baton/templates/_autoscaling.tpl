{{/* What a role is scaled by, as a list: metric, its labels, how much of it a replica takes, and the query for all of it.
Every proxy exports the same series of a worker: counted once. */}}
{{- define "baton.signals" -}}
{{- $limits := index .root.Values.autoscaling .component -}}
{{- $labels := dict "namespace" .root.Release.Namespace "service" (include "baton.fullname" .root) "role" .component -}}
{{- $matchers := list -}}
{{- range $name, $value := $labels }}{{ $matchers = append $matchers (printf "%s=%q" $name $value) }}{{ end -}}
{{- if eq .component "prefill" }}
{{- include "baton.signal" (dict "metric" "baton:worker_waiting_tokens" "labels" $labels "matchers" $matchers "perReplica" $limits.waitingTokens) }}
{{- else }}
{{- include "baton.signal" (dict "metric" "baton:worker_running" "labels" $labels "matchers" $matchers "perReplica" $limits.requests) }}
{{- include "baton.signal" (dict "metric" "baton:worker_waiting" "labels" $labels "matchers" $matchers "perReplica" $limits.requests) }}
{{- end }}
{{- end -}}

{{- define "baton.signal" }}
- metric: {{ .metric }}
  labels:
    {{- toYaml .labels | nindent 4 }}
  perReplica: {{ .perReplica }}
  query: {{ printf "sum(max by (worker) (%s{%s}))" .metric (join "," .matchers) | squote }}
{{- end -}}

{{- define "baton.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .scaleUp.stabilizationSeconds }}
  policies:
    - { type: Percent, value: {{ .scaleUp.percent }}, periodSeconds: {{ .scaleUp.periodSeconds }} }
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDown.stabilizationSeconds }}
  policies:
    - { type: Pods, value: {{ .scaleDown.pods }}, periodSeconds: {{ .scaleDown.periodSeconds }} }
{{- end -}}
