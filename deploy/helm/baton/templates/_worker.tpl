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
