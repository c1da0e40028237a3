{{/*
Values of the charts 0.1.x. They put extraVars into the data of a Secret, so these had to be base64, and their agent read
its configuration from the environment: base64 of the variables below sets these values, as it did there.
*/}}
{{- define "magic-ip-address.oldVariables" -}}
MAGIC_IP: ipAddress
SELECTOR: selector
HOST_INTERFACE: hostInterface
PORT: port
MAGIC_PORT: port
TARGET_PORT: targetPort
PROTOCOL: protocol
POLL_INTERVAL: pollInterval
VERBOSE: verbose
{{- end -}}

{{/* What a text is base64 of, if that is printable text; else nothing. */}}
{{- define "magic-ip-address.decoded" -}}
{{- if regexMatch "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$" . -}}
{{- $text := b64dec . -}}
{{- if and (regexMatch "^[ -~]*\\n?$" $text) (eq (b64enc $text) .) -}}
{{- trimSuffix "\n" $text -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A value as text; numbers of a values file are floats, which would become 1e+06. */}}
{{- define "magic-ip-address.text" -}}
{{- if kindIs "invalid" . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* config with what extraVars of 0.1.x say, as JSON. MAGIC_PORT and TARGET_PORT default to PORT. */}}
{{- define "magic-ip-address.effectiveConfig" -}}
{{- $config := deepCopy .Values.config -}}
{{- $names := include "magic-ip-address.oldVariables" . | fromYaml -}}
{{- $before := dict -}}
{{- range $name, $value := .Values.extraVars -}}
  {{- if hasKey $names $name -}}
    {{- $before = set $before $name (include "magic-ip-address.text" $value | include "magic-ip-address.decoded") -}}
  {{- end -}}
{{- end -}}
{{- with $before.PORT -}}
{{- $config = set $config "port" . -}}
{{- end -}}
{{- with $before.MAGIC_PORT -}}
{{- if not $config.targetPort -}}
{{- $config = set $config "targetPort" (include "magic-ip-address.text" $config.port) -}}
{{- end -}}
{{- $config = set $config "port" . -}}
{{- end -}}
{{- range $name, $key := omit $names "PORT" "MAGIC_PORT" -}}
{{- with get $before $name -}}
{{- $config = set $config $key . -}}
{{- end -}}
{{- end -}}
{{- toJson $config -}}
{{- end -}}

{{/* The environment of the agent's container from extraVars, as JSON: base64 is decoded where all of it is base64, as it was in 0.1.x. */}}
{{- define "magic-ip-address.extraVars" -}}
{{- $plain := dict -}}
{{- $decoded := dict -}}
{{- $old := true -}}
{{- range $name, $value := .Values.extraVars -}}
  {{- $text := include "magic-ip-address.text" $value -}}
  {{- $plain = set $plain $name $text -}}
  {{- $decoded = set $decoded $name (include "magic-ip-address.decoded" $text) -}}
  {{- if and $text (not (get $decoded $name)) -}}
    {{- $old = false -}}
  {{- end -}}
{{- end -}}
{{- $variables := ternary $decoded $plain $old -}}
{{- range include "magic-ip-address.oldVariables" . | fromYaml | keys -}}
  {{- $variables = unset $variables . -}}
{{- end -}}
{{- range include "magic-ip-address.oldCredentials" . | fromYamlArray -}}
  {{- $variables = unset $variables . -}}
{{- end -}}
{{- toJson $variables -}}
{{- end -}}

{{/* What the old agent sent messages with: nothing reads it now, and it must not be in the pod for everybody to see. */}}
{{- define "magic-ip-address.oldCredentials" -}}
[SLACK_URL, HIPCHAT_AUTH_TOKEN, HIPCHAT_ROOM_ID]
{{- end -}}

{{/* The image of 0.1.x. */}}
{{- define "magic-ip-address.isOldImage" -}}
{{- if regexMatch "^((index\\.)?docker\\.io/)?mumoshu/kube-magic-ip-assigner$" .Values.image.repository -}}true{{- end -}}
{{- end -}}

{{/* What of the values of 0.1.x has no effect any more, for the notes. */}}
{{- define "magic-ip-address.oldValues" -}}
{{- if include "magic-ip-address.isOldImage" . -}}
image.repository {{ .Values.image.repository }} is the agent of chart 0.1.x: image.repository and image.tag are ignored, the
image is {{ include "magic-ip-address.image" . }}.
{{- end -}}
{{- $ignored := list -}}
{{- range include "magic-ip-address.oldCredentials" . | fromYamlArray -}}
  {{- if hasKey (default dict $.Values.extraVars) . -}}
    {{- $ignored = append $ignored . -}}
  {{- end -}}
{{- end -}}
{{- with $ignored }}
extraVars {{ join ", " . }}: ignored. The agent sends no chat messages; it records Events and serves metrics.
{{- end -}}
{{- end -}}
