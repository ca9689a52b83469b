{{/* Pods of a worker: only those of prefill may be several. */}}
{{- define "baton.stages" -}}
{{- ternary (int .root.Values.prefill.stages) 1 (eq .component "prefill") -}}
{{- end -}}

{{/* A group of LeaderWorkerSet: a worker, and the stages behind the first, which come back by themselves. */}}
{{- define "baton.group" -}}
{{- $stages := include "baton.stages" . | int -}}
size: {{ $stages }}
{{- if gt $stages 1 }}
{{- if eq .root.Values.device "cuda" }}
{{- fail "prefill.stages needs device: cpu" }}
{{- end }}
{{- if hasKey .root.Values.prefill.options "pp" }}
{{- fail "prefill.stages sets prefill.options.pp: leave one of them out" }}
{{- end }}
restartPolicy: None
leaderTemplate:
  {{- include "baton.worker" . | nindent 2 }}
workerTemplate:
  {{- include "baton.stage" (dict "root" .root "component" "stage") | nindent 2 }}
{{- else }}
workerTemplate:
  {{- include "baton.worker" . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* How groups are updated. The context is a role's values. */}}
{{- define "baton.groupRollout" -}}
type: RollingUpdate
rollingUpdateConfiguration:
  maxSurge: {{ ternary 1 0 (eq .rollout "surge") }}
  maxUnavailable: {{ ternary 0 1 (eq .rollout "surge") }}
{{- end -}}

{{/* The pod template of a worker. The context is a dict: root, component (prefill, decode or mixed). */}}

{{- define "baton.worker" -}}
{{- $values := .root.Values -}}
{{- $role := index $values .component -}}
metadata:
  {{- include "baton.podMetadata" . | nindent 2 }}
spec:
  {{- include "baton.podSpec" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $role.drainSeconds 30 }}
  {{- if $values.store.enabled }}
  hostPID: true # memory of the store, and of other workers of the node, is mapped through /proc
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "baton.image" .root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [baton, {{ .component | replace "mixed" "decode" }}]
      args:
        {{- if eq .component "mixed" }}
        - --mixed
        {{- end }}
        - {{ printf "--model=%s" $values.model.name | quote }}
        - --worker-id=$(POD_NAME)
        - {{ printf "--revision=%s" (include "baton.revision" .root) | quote }}
        - --device={{ $values.device }}
        - "--bind=tcp://{{ include "baton.podAddress" .root }}:0"
        {{- if gt (include "baton.stages" . | int) 1 }}
        - --pp={{ include "baton.stages" . }}
        - "--stages-bind=tcp://{{ include "baton.podAddress" .root }}:5572"
        {{- end }}
        - --probe-port=8080
        - --secret-file=/etc/baton/cluster/secret
        - --drain-s={{ $role.drainSeconds }}
        - --log-level={{ $values.logLevel }}
        {{- include "baton.proxyAddresses" .root | trim | nindent 8 }}
        {{- if $values.store.enabled }}
        - --store=tcp://{{ include "baton.fullname" .root }}-store.{{ .root.Release.Namespace }}.svc:5571
        {{- end }}
        {{- with $role.options }}
        {{- include "baton.options" . | trim | nindent 8 }}
        {{- end }}
      env:
        {{- include "baton.env" . | nindent 8 }}
        {{- if eq $values.device "cpu" }}
        - name: OMP_NUM_THREADS # else as many as the node has cores
          valueFrom: { resourceFieldRef: { resource: requests.cpu, divisor: "1" } }
        {{- end }}
      ports:
        - { name: probe, containerPort: 8080 }
        {{- if gt (include "baton.stages" . | int) 1 }}
        - { name: stages, containerPort: 5572 }
        {{- end }}
      {{- include "baton.probes" . | nindent 6 }}
      resources:
        {{- $resources := deepCopy $role.resources }}
        {{- if eq $values.device "cuda" }}
        {{- $resources = mustMergeOverwrite (dict "limits" (dict $values.gpuResource 1)) $resources }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      {{- include "baton.containerSecurity" . | nindent 6 }}
      volumeMounts:
        {{- include "baton.mounts" . | nindent 8 }}
        - { name: shm, mountPath: /dev/shm }
  volumes:
    {{- include "baton.volumes" . | nindent 4 }}
    - { name: shm, emptyDir: { medium: Memory, sizeLimit: {{ $role.shmSize }} } }
{{- end -}}
