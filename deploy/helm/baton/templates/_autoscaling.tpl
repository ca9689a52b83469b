{{/* What a role is scaled by, as a list: metric, its labels, how much of it a replica takes, and the query for all of it.
Every proxy exports the series of all workers, so each worker is counted once; of what proxies compute, the largest. */}}
{{- define "baton.signals" -}}
{{- $auto := .root.Values.autoscaling -}}
{{- $labels := dict "namespace" .root.Release.Namespace "service" (include "baton.fullname" .root) "role" .component -}}
{{- if has "slo" $auto.signals }}
{{- include "baton.signal" (dict "metric" "baton:desired_replicas" "labels" $labels "perReplica" 1 "query" "max(%s)") }}
{{- end }}
{{- if has "queue" $auto.signals }}
{{- $metric := ternary "baton:worker_waiting_tokens" "baton:worker_running" (eq .component "prefill") }}
{{- $limits := index $auto .component }}
{{- $most := ternary $limits.waitingTokens $limits.runningRequests (eq .component "prefill") }}
{{- include "baton.signal" (dict "metric" $metric "labels" $labels "perReplica" $most "query" "sum(max by (worker) (%s))") }}
{{- end }}
{{- end -}}

{{/* The kind of object that a role's workers are. */}}
{{- define "baton.scaled" -}}
{{- if gt (include "baton.stages" . | int) 1 -}}
apiVersion: leaderworkerset.x-k8s.io/v1, kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1, kind: Deployment
{{- end -}}
{{- end -}}

{{- define "baton.signal" }}
{{- $matchers := list -}}
{{- range $name, $value := .labels }}{{ $matchers = append $matchers (printf "%s=%q" $name $value) }}{{ end }}
- metric: {{ .metric }}
  labels:
    {{- toYaml .labels | nindent 4 }}
  perReplica: {{ int64 .perReplica }}
  query: {{ printf .query (printf "%s{%s}" .metric (join "," $matchers)) | squote }}
{{- end -}}

{{/* The signal slo comes with windows and rates: further ones would only make it late. */}}
{{- define "baton.scalingBehavior" -}}
{{- $queue := has "queue" .signals -}}
scaleUp:
  stabilizationWindowSeconds: {{ ternary .scaleUp.stabilizationSeconds 0 $queue }}
  policies:
    - { type: Percent, value: {{ .scaleUp.percent }}, periodSeconds: {{ .scaleUp.periodSeconds }} }
    - { type: Pods, value: {{ .scaleUp.pods }}, periodSeconds: {{ .scaleUp.periodSeconds }} }
scaleDown:
  stabilizationWindowSeconds: {{ ternary .scaleDown.stabilizationSeconds 0 $queue }}
  policies:
    - { type: Pods, value: {{ .scaleDown.pods }}, periodSeconds: {{ .scaleDown.periodSeconds }} }
{{- end -}}
