{{- define "fptq.labels" -}}
app.kubernetes.io/name: fptq, app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fptq.options" -}}
--host, 0.0.0.0, --port, "8000", --drain-timeout, {{ .Values.drainTimeout | int | quote }}, --log-format, json
{{- end }}

{{- define "fptq.args" -}}
{{- if .Values.inferencePool.enabled }}, --metrics-aliases, vllm{{ end }}
{{- if .Values.apiKeysSecret }}, --api-keys-file, /etc/fptq/keys{{ end }}
{{- range .Values.args }}, {{ . | quote }}{{ end }}
{{- end }}

{{- define "fptq.gracePeriod" -}}
{{ add .Values.preStopSeconds .Values.drainTimeout 20 }}  # preStop, --drain-timeout, the connections' last 10 s, and 10 s
{{- end }}

{{- /* What containers have in common. port: as probes call it. */}}
{{- define "fptq.container" -}}
startupProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div .Values.startupSeconds 5 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 1
livenessProbe:
  httpGet: {path: /livez, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
lifecycle:
  preStop: {sleep: {seconds: {{ .Values.preStopSeconds | int }}}}  # until nobody sends to this pod any more
resources:
  {{- toYaml .Values.resources | nindent 2 }}
{{- with .Values.env }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "fptq.mounts" -}}
- {name: cache, mountPath: /var/cache}
- {name: tmp, mountPath: /tmp}
{{- if .Values.apiKeysSecret }}
- {name: keys, mountPath: /etc/fptq, readOnly: true}
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fptq.volumes" -}}
- {name: cache, emptyDir: {sizeLimit: {{ .Values.cacheSize }}}}
- {name: tmp, emptyDir: {sizeLimit: {{ .Values.tmpSize }}}}
{{- with .Values.apiKeysSecret }}
- {name: keys, secret: {secretName: {{ . }}}}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fptq.operatorLabels" -}}
app.kubernetes.io/name: fptq
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.prometheusOperator.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}
