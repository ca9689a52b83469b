{{/* Names and labels. The context is the root, or a dict of root and component where one is needed. */}}

{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 36 characters: a worker is called as its pod, FULLNAME-prefill-HASH-SUFFIX, and that has at most 64. */}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else if contains (include "baton.name" .) .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "baton.releaseLabels" -}}
app.kubernetes.io/name: {{ include "baton.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "baton.selector" -}}
{{ include "baton.releaseLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: baton
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "baton.metadata" -}}
name: {{ printf "%s%s" (include "baton.fullname" .root) (default "" .suffix) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "baton.labels" . | nindent 2 }}
{{- end -}}

{{- define "baton.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "baton.clusterSecret" -}}
{{- default (printf "%s-secret" (include "baton.fullname" .)) .Values.secret.existingSecret -}}
{{- end -}}

{{- define "baton.keysSecret" -}}
{{- default (printf "%s-api-keys" (include "baton.fullname" .)) .Values.apiKeys.existingSecret -}}
{{- end -}}

{{/* The roles of workers, with commas between them. */}}
{{- define "baton.roles" -}}
{{- ternary "mixed" "prefill,decode" (eq .Values.roles "adaptive") -}}
{{- end -}}

{{/* "true" where clients need a key out of the keys' Secret. */}}
{{- define "baton.hasKeys" -}}
{{- if and .Values.apiKeys.enabled (not .Values.tenants.existingSecret) -}}true{{- end -}}
{{- end -}}
