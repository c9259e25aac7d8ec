{{- define "qserve.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "qserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: qserve
{{- end }}

{{- define "qserve.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "qserve.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "qserve.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "qserve.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- /* Probes speak HTTPS where the gateway is given a certificate. */}}
{{- define "qserve.scheme" -}}
{{- range .Values.gateway.args }}{{ if hasPrefix "--ssl-certfile" . }}, scheme: HTTPS{{ end }}{{ end }}
{{- end }}

{{- define "qserve.ownValkey" -}}
{{- if not (or .Values.redis.url .Values.redis.existingSecret) }}true{{ end }}
{{- end }}

{{- /* What every process needs to know: the server, the key, and a folder in which it may write. */}}
{{- define "qserve.env" -}}
- name: QSERVE_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ .Values.secret.existingSecret | default (include "qserve.name" .) }}
      key: {{ if .Values.secret.existingSecret }}{{ .Values.secret.existingSecretKey }}{{ else }}secret{{ end }}
{{- if include "qserve.ownValkey" . }}
- name: VALKEY_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "qserve.name" . }}
      key: valkey-password
- name: QSERVE_REDIS_URL
  value: redis://:$(VALKEY_PASSWORD)@{{ include "qserve.name" . }}-valkey:6379/0
{{- else }}
- name: QSERVE_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret | default (include "qserve.name" .) }}
      key: {{ if .Values.redis.existingSecret }}{{ .Values.redis.existingSecretKey }}{{ else }}redis-url{{ end }}
{{- end }}
- name: QSERVE_RUNTIME_DIR
  value: /tmp/qserve
{{- range $name, $value := .Values.settings }}
- name: {{ $name }}
  {{- /* Numbers of a file of values are floats, and without JSON a million would be 1e+06. */}}
  value: {{ if kindIs "string" $value }}{{ $value | quote }}{{ else }}{{ $value | toJson | quote }}{{ end }}
{{- end }}
{{- end }}

{{- define "qserve.pod" -}}
serviceAccountName: {{ include "qserve.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .place.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{- toYaml (mergeOverwrite (dict "labelSelector" (dict "matchLabels" $.labels)) .) | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .place.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .place.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  {{- with .place.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
