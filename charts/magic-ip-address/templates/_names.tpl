{{/* The label app, and a part of names. The selector of a DaemonSet cannot be changed: this must stay as in chart 0.1.x. */}}
{{- define "magic-ip-address.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of the objects, as in chart 0.1.x. */}}
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

{{/* The name that owns rules and files on the nodes. A parent chart may hold this one more than once, by aliases: each is an agent. */}}
{{- define "magic-ip-address.agentName" -}}
{{- $name := printf "%s.%s" .Release.Namespace .Release.Name -}}
{{- if ne .Chart.Name "magic-ip-address" -}}
{{- $name = printf "%s.%s" $name (regexReplaceAll "[^-.a-z0-9]" (lower .Chart.Name) "-" | trimAll "-.") -}}
{{- end -}}
{{- $name = default $name .Values.config.name -}}
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

{{/* Labels of all objects: the chart's own, which the user's cannot replace, and commonLabels. */}}
{{- define "magic-ip-address.labels" -}}
{{- $own := dict
  "chart" (include "magic-ip-address.chart" .)
  "heritage" .Release.Service
  "app.kubernetes.io/name" (include "magic-ip-address.name" .)
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/managed-by" .Release.Service
  "helm.sh/chart" (include "magic-ip-address.chart" .)
-}}
{{- merge (include "magic-ip-address.selectorLabels" . | fromYaml) $own (include "magic-ip-address.texts" .Values.commonLabels | fromYaml) | toYaml -}}
{{- end -}}

{{/* The rest of the metadata of an object, from its labels on. */}}
{{- define "magic-ip-address.metadata" -}}
labels:
  {{- include "magic-ip-address.labels" . | nindent 2 }}
{{- with include "magic-ip-address.texts" .Values.commonAnnotations | fromYaml }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A map with texts for its values, as labels and annotations must be. */}}
{{- define "magic-ip-address.texts" -}}
{{- $texts := dict -}}
{{- range $key, $value := . -}}
{{- $texts = set $texts $key (include "magic-ip-address.text" $value) -}}
{{- end -}}
{{- toYaml $texts -}}
{{- end -}}

{{- define "magic-ip-address.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* [registry/]repository:tag, or with image.digest [registry/]repository@digest. */}}
{{- define "magic-ip-address.image" -}}
{{- $image := .Values.image -}}
{{- if include "magic-ip-address.isOldImage" . -}}
{{- $image = dict "repository" "magic-ip-address/magic-ip-address" "registry" $image.registry -}}
{{- end -}}
{{- with default $image.registry (default dict .Values.global).imageRegistry -}}
{{ . | trimSuffix "/" }}/
{{- end -}}
{{- $image.repository -}}
{{- if $image.digest -}}
@{{ $image.digest }}
{{- else -}}
:{{ default .Chart.AppVersion (include "magic-ip-address.text" $image.tag) }}
{{- end -}}
{{- end -}}

{{/* The pull secrets of the chart and of the parent's global.imagePullSecrets, as JSON. */}}
{{- define "magic-ip-address.imagePullSecrets" -}}
{{- $secrets := list -}}
{{- range concat (default list (default dict .Values.global).imagePullSecrets) (default list .Values.imagePullSecrets) -}}
{{- $secrets = append $secrets (kindIs "string" . | ternary (dict "name" .) .) -}}
{{- end -}}
{{- $secrets | uniq | toJson -}}
{{- end -}}
