{{/* What the schema cannot see: values that do not go together. The agent would refuse them too, on every node. */}}
{{- define "magic-ip-address.checks" -}}
{{- if not (and .Values.cni .Values.api .Values.metrics .Values.installer) -}}
  {{- fail "these are the values of another version of this chart; say --reset-then-reuse-values instead of --reuse-values" -}}
{{- end -}}
{{- if hasSuffix "kube-magic-ip-assigner" .Values.image.repository -}}
  {{- fail (printf "image.repository %s is the agent of chart 0.1.0; leave image.repository and image.tag out, or set them to the image of this chart" .Values.image.repository) -}}
{{- end -}}
{{- if not .Values.api.enabled -}}
  {{- if not .Values.cni.enabled -}}
    {{- fail "with api.enabled=false and cni.enabled=false nothing tells the agent of pods; one of the two must be true" -}}
  {{- end -}}
  {{- range include "magic-ip-address.magicIPs" . | fromJsonArray -}}
    {{- if .owner -}}
      {{- fail (printf "%s: owner needs the Kubernetes API, which api.enabled=false rules out" .ipAddress) -}}
    {{- end -}}
    {{- if eq (default "" .readiness) "require" -}}
      {{- fail (printf "%s: readiness: require needs the Kubernetes API, which api.enabled=false rules out" .ipAddress) -}}
    {{- end -}}
    {{- range .ports -}}
      {{- if and .targetPort (not (regexMatch "^[0-9]+$" .targetPort)) -}}
        {{- fail (printf "targetPort %q: a name needs the Kubernetes API, which api.enabled=false rules out" .targetPort) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $instead := dict "MAGIC_IP" "config.ipAddress" "SELECTOR" "config.selector" "NAMESPACE" "config.namespace" "HOST_INTERFACE" "config.hostInterface" "PORT" "config.port" "MAGIC_PORT" "config.port" "TARGET_PORT" "config.targetPort" "PROTOCOL" "config.protocol" "POLL_INTERVAL" "config.pollInterval" "VERBOSE" "config.verbose" -}}
{{- range $name, $_ := .Values.extraVars -}}
  {{- with get $instead $name -}}
    {{- fail (printf "extraVars.%s: the agent has a configuration file and does not look at this variable; set %s instead" $name .) -}}
  {{- end -}}
  {{- if has $name (list "NODE_NAME" "POD_NAME" "POD_NAMESPACE" "POD_UID" "HOST_IP") -}}
    {{- fail (printf "extraVars.%s: the chart sets this variable" $name) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
