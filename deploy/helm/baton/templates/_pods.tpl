{{/* What pods of all roles share. The context is a dict: root, component (proxy, prefill, decode, mixed, store). */}}

{{- define "baton.image" -}}
{{- $tag := default (printf "%s%s" .Chart.AppVersion (ternary "-cpu" "" (eq .Values.device "cpu"))) .Values.image.tag -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}

{{/* Of workers. It changes with what may make KV or tokens others, and with nothing else: it restarts both roles. */}}
{{- define "baton.revision" -}}
{{- $image := include "baton.image" . -}}
{{- $kv := dict -}}
{{- range $role := list .Values.prefill.options .Values.decode.options .Values.mixed.options -}}
{{- range $name := list "block-tokens" "dtype" "kv-dtype" "load-format" "max-model-len" "quantization" -}}
{{- if hasKey $role $name }}{{ $_ := set $kv $name (append (default list (index $kv $name)) (index $role $name)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $of := list $image .Values.device .Values.model.name .Values.model.volume $kv | toJson | sha256sum | trunc 6 -}}
{{- default (printf "%s-%s" (splitList ":" $image | last | trunc 48) $of) .Values.revision -}}
{{- end -}}

{{/* Options as arguments: a list repeats its option, true is the option alone, false is left out. Helm reads whole
numbers as floats, which would be written as 1.048576e+06. */}}
{{- define "baton.options" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
{{- if $value }}
- --{{ $name }}
{{- end }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%v" $name . | quote }}
{{- end }}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}
- {{ printf "--%s=%d" $name (int64 $value) | quote }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The control addresses of all proxies. */}}
{{- define "baton.proxyAddresses" -}}
{{- $root := . -}}
{{- range $index := until (int .Values.proxy.replicas) }}
- --proxy=tcp://{{ include "baton.fullname" $root }}-proxy-{{ $index }}.{{ include "baton.fullname" $root }}-proxy.{{ $root.Release.Namespace }}.svc:5570
{{- end }}
{{- end -}}

{{/* The pod's own address as part of a URL. */}}
{{- define "baton.podAddress" -}}
{{- if eq .Values.ipFamily "IPv6" }}[$(POD_IP)]{{ else }}$(POD_IP){{ end -}}
{{- end -}}

{{- define "baton.pod" -}}
{{- mustMergeOverwrite (deepCopy .root.Values.pod) (deepCopy (default dict (index .root.Values .component).pod)) | toYaml -}}
{{- end -}}

{{- define "baton.podMetadata" -}}
{{- $pod := include "baton.pod" . | fromYaml -}}
labels:
  {{- include "baton.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: baton
  {{- if has .component (list "prefill" "decode" "mixed") }}
  llm-d.ai/role: {{ .component | replace "mixed" "prefill-decode" }}
  {{- end }}
  {{- with $pod.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $pod.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Identity, security and placement: all of a pod's spec but its containers and volumes. */}}
{{- define "baton.podSpec" -}}
{{- $pod := include "baton.pod" . | fromYaml -}}
serviceAccountName: {{ include "baton.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if and $pod.topologySpread.key (has .component (list "proxy" "prefill" "decode" "mixed")) }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ $pod.topologySpread.key }}
    whenUnsatisfiable: {{ $pod.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "baton.selector" . | nindent 8 }}
{{- end }}
{{- end -}}

{{- define "baton.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{- define "baton.env" -}}
{{- $pod := include "baton.pod" . | fromYaml -}}
{{- $values := .root.Values -}}
- name: POD_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
- name: POD_IP
  valueFrom: { fieldRef: { fieldPath: status.podIP } }
- { name: HOME, value: /tmp }
- { name: HF_HOME, value: /cache/huggingface }
- { name: TRITON_CACHE_DIR, value: /cache/triton }
{{- with $values.model.hubToken }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom: { secretKeyRef: { name: {{ .existingSecret }}, key: {{ .key }} } }
{{- end }}
{{- end }}
{{- range $name, $value := $pod.env }}
- { name: {{ $name }}, value: {{ $value | quote }} }
{{- end }}
{{- end -}}

{{/* /tmp, /cache, the secret of the cluster, and the model. */}}
{{- define "baton.mounts" -}}
- { name: tmp, mountPath: /tmp }
- { name: cache, mountPath: /cache }
- { name: cluster-secret, mountPath: /etc/baton/cluster, readOnly: true }
{{- if .root.Values.model.volume }}
- { name: model, mountPath: /models, readOnly: true }
{{- end }}
{{- end -}}

{{/* A Secret's file is root's, and fsGroup may read it: the one way in which Baton takes a file of another user. */}}
{{- define "baton.volumes" -}}
- { name: tmp, emptyDir: {} }
- name: cache
  {{- with .root.Values.cache.persistentVolumeClaim }}
  persistentVolumeClaim: { claimName: {{ . }} }
  {{- else }}
  emptyDir: {}
  {{- end }}
- name: cluster-secret
  secret:
    secretName: {{ include "baton.clusterSecret" .root }}
    defaultMode: 0440
    items: [{ key: {{ .root.Values.secret.key }}, path: secret }]
{{- with .root.Values.model.volume }}
- name: model
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Probes of a worker or store. They live while they load a model, and are ready once a proxy has them. */}}
{{- define "baton.probes" -}}
startupProbe:
  httpGet: { path: /live, port: probe }
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: { path: /live, port: probe }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: { path: /ready, port: probe }
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}
