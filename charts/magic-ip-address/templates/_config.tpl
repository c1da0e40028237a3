{{/*
The magic IPs as a JSON list, so that templates can look at them: what config.magicIPs says, and in front of it the
one of the keys beside it, unless config.magicIPs is there and config.selector is still the placeholder.
What is empty is left out. Numbers and booleans may have come as strings (--set-string).
*/}}
{{- define "magic-ip-address.magicIPs" -}}
{{- $config := .Values.config -}}
{{- $listed := default list $config.magicIPs -}}
{{- if or (not $listed) (ne (toString $config.selector) "app=myapp") -}}
{{- $flat := omit $config "magicIPs" "name" "pollInterval" "verbose" "port" "targetPort" "protocol" -}}
{{- $listed = prepend $listed (set $flat "ports" (list (pick $config "port" "targetPort" "protocol"))) -}}
{{- end -}}
{{- $magicIPs := list -}}
{{- range $raw := $listed -}}
  {{- $magicIP := dict "namespace" (default $.Release.Namespace $raw.namespace) -}}
  {{- range $key := list "ipAddress" "selector" "owner" "hostInterface" "readiness" "distribution" "noEndpoint" "holdFor" -}}
    {{- with get $raw $key -}}{{- $magicIP = set $magicIP $key (toString .) -}}{{- end -}}
  {{- end -}}
  {{- range $key := list "hostClients" "excludeTarget" "allowReserved" -}}
    {{- if has (get $raw $key | toString) (list "true" "false") -}}
      {{- $magicIP = set $magicIP $key (eq (get $raw $key | toString) "true") -}}
    {{- end -}}
  {{- end -}}
  {{- $ports := list -}}
  {{- range $rawPort := $raw.ports -}}
    {{- $port := dict "port" (int $rawPort.port) -}}
    {{- with $rawPort.targetPort -}}{{- $port = set $port "targetPort" (toString .) -}}{{- end -}}
    {{- with $rawPort.protocol -}}{{- $port = set $port "protocol" (lower .) -}}{{- end -}}
    {{- $ports = append $ports $port -}}
  {{- end -}}
  {{- $magicIPs = append $magicIPs (set $magicIP "ports" $ports) -}}
{{- end -}}
{{- toJson $magicIPs -}}
{{- end -}}

{{/* The namespaces that are served, as a JSON list. */}}
{{- define "magic-ip-address.namespaces" -}}
{{- $namespaces := list -}}
{{- range include "magic-ip-address.magicIPs" . | fromJsonArray -}}
{{- $namespaces = append $namespaces .namespace -}}
{{- end -}}
{{- $namespaces | uniq | sortAlpha | toJson -}}
{{- end -}}

{{/* The agent's configuration file. */}}
{{- define "magic-ip-address.config" -}}
name: {{ include "magic-ip-address.agentName" . | quote }}
pollInterval: {{ .Values.config.pollInterval | default 5 | int }}s
magicIPs:
{{ include "magic-ip-address.magicIPs" . | fromJsonArray | toYaml | indent 2 }}
{{- end -}}
