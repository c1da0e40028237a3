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
{{- include "magic-ip-address.livingRelease" . -}}
{{- end -}}

{{/* What cannot be changed by an upgrade, because what was put on the nodes before would stay: whoever put it there is told to stop, which
is no reason to take it out, and whoever comes does not know of it. */}}
{{- define "magic-ip-address.livingRelease" -}}
{{- $pod := lookup "apps/v1" "DaemonSet" .Release.Namespace (include "magic-ip-address.fullname" .) | dig "spec" "template" "spec" dict -}}
{{- $way := printf "helm uninstall %s --namespace %s, and then install it with the new value" .Release.Name .Release.Namespace -}}
{{- $ours := false -}}
{{- range $pod.containers -}}
  {{- if eq .name "agent" -}}
    {{- $ours = true -}}
    {{- range dig "readinessProbe" "exec" "command" list . -}}
      {{- if and (hasPrefix "--name=" .) (ne . (printf "--name=%s" (include "magic-ip-address.agentName" $))) -}}
        {{- fail (printf "config.name cannot be changed in a living release: the rules of %s would stay on the nodes. %s" (trimPrefix "--name=" .) $way) -}}
      {{- end -}}
    {{- end -}}
  {{- else if and (eq .name "installer") (not $.Values.cni.enabled) -}}
    {{- fail (printf "cni.enabled cannot be switched off in a living release: its entry in the CNI configuration of the nodes would stay. %s" $way) -}}
  {{- end -}}
{{- end -}}
{{- if $ours -}}
  {{- range $pod.volumes -}}
    {{- $path := dig "hostPath" "path" "" . -}}
    {{- if and (eq .name "runtime") (ne $path $.Values.runtimeDir) -}}
      {{- fail (printf "runtimeDir cannot be changed in a living release: the entry in the CNI configuration of the nodes names %s. %s" $path $way) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
