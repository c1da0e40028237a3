{{/* The label app, and a part of names. The selector of a DaemonSet cannot be changed: this must stay what chart 0.1.0 made. */}}
{{- define "magic-ip-address.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of the objects, made as chart 0.1.0 made it. */}}
{{- define "magic-ip-address.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The name of objects outside the release's namespace, where a release of the same name may have its own. */}}
{{- define "magic-ip-address.globalName" -}}
{{- printf "%s.%s" .Release.Namespace (include "magic-ip-address.fullname" .) -}}
{{- end -}}

{{/* The name that owns rules and files on the nodes. */}}
{{- define "magic-ip-address.agentName" -}}
{{- $name := default (printf "%s.%s" .Release.Namespace .Release.Name) .Values.config.name -}}
{{- if gt (len $name) 117 -}}
{{- fail (printf "the agent's name %q has %d characters, at most 117 are possible; set a shorter config.name" $name (len $name)) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "magic-ip-address.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "magic-ip-address.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* What the DaemonSet selects its pods by: never more, never less. */}}
{{- define "magic-ip-address.selectorLabels" -}}
app: {{ include "magic-ip-address.name" . | quote }}
release: {{ .Release.Name | quote }}
{{- end -}}

{{- define "magic-ip-address.labels" -}}
{{ include "magic-ip-address.selectorLabels" . }}
chart: {{ include "magic-ip-address.chart" . }}
heritage: {{ .Release.Service }}
app.kubernetes.io/name: {{ include "magic-ip-address.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ include "magic-ip-address.chart" . }}
{{- end -}}

{{- define "magic-ip-address.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "magic-ip-address.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
