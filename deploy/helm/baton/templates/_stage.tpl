{{/* The pod template of a stage behind the first of a prefill worker. Its controller sets LWS_LEADER_ADDRESS, the name of the
first one's pod. A stage that gets SIGTERM drains the worker, so it has as long as that. */}}

{{- define "baton.stage" -}}
{{- $values := .root.Values -}}
metadata:
  {{- include "baton.podMetadata" . | nindent 2 }}
spec:
  {{- include "baton.podSpec" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $values.prefill.drainSeconds 30 }}
  containers:
    - name: stage
      image: {{ include "baton.image" .root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [baton, stage]
      args:
        - {{ printf "--model=%s" $values.model.name | quote }}
        - --first=tcp://$(LWS_LEADER_ADDRESS):5572
        - "--bind=tcp://{{ include "baton.podAddress" .root }}:0"
        - --probe-port=8080
        - --secret-file=/etc/baton/cluster/secret
        - --log-level={{ $values.logLevel }}
        {{- with $values.stage.options }}
        {{- include "baton.options" . | trim | nindent 8 }}
        {{- end }}
      env:
        {{- include "baton.env" . | nindent 8 }}
        - name: OMP_NUM_THREADS # else as many as the node has cores
          valueFrom: { resourceFieldRef: { resource: requests.cpu, divisor: "1" } }
      ports:
        - { name: probe, containerPort: 8080 }
      {{- include "baton.probes" . | nindent 6 }}
      resources:
        {{- toYaml $values.stage.resources | nindent 8 }}
      {{- include "baton.containerSecurity" . | nindent 6 }}
      volumeMounts:
        {{- include "baton.mounts" . | nindent 8 }}
  volumes:
    {{- include "baton.volumes" . | nindent 4 }}
{{- end -}}
