{{/* What the schema cannot express. The agent would reject most of it too, but on every node, after the installation. */}}
{{- define "magic-ip-address.checks" -}}
{{- if not (hasKey .Values "checked") -}}
{{- include "magic-ip-address.checkAll" . -}}
{{- $_ := set .Values "checked" true }}{{/* once for all templates: with 1,000 magic IPs it takes a second */ -}}
{{- end -}}
{{- end -}}

{{- define "magic-ip-address.checkAll" -}}
{{- if not (and .Values.cni .Values.api .Values.metrics .Values.installer .Values.metrics.podMonitor .Values.metrics.rules .Values.metrics.dashboard) -}}
  {{- fail "these are the values of another version of this chart; say --reset-then-reuse-values instead of --reuse-values" -}}
{{- end -}}
{{- if and (hasSuffix "kube-magic-ip-assigner" .Values.image.repository) (not (include "magic-ip-address.isOldImage" .)) -}}
  {{- fail (printf "image.repository %s is the agent of chart 0.1.x; leave image.repository and image.tag out, or set them to the image of this chart" .Values.image.repository) -}}
{{- end -}}
{{- if not (or .Values.api.enabled (include "magic-ip-address.installs" .)) -}}
  {{- fail "with api.enabled=false and cni.enabled=false (which cni.preset=openshift means) the agent has no source of pods; one of the two must be true" -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.metrics.enabled) -}}
  {{- fail "metrics.podMonitor.enabled needs metrics.enabled: without it the agents serve no metrics" -}}
{{- end -}}
{{- if and .Values.appArmorProfile (semverCompare "<1.30-0" .Capabilities.KubeVersion.Version) -}}
  {{- fail (printf "appArmorProfile needs Kubernetes 1.30, this is %s; leave it out: the container runtime applies its default profile" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if include "magic-ip-address.installs" . -}}
{{- range $dir := include "magic-ip-address.cniDirs" . | fromJson | values | sortAlpha -}}
  {{- range $own := list "/usr/local/bin/" "/etc/magic-ip-address/" "/var/run/secrets/kubernetes.io/serviceaccount/" (print $.Values.runtimeDir "/") -}}
    {{- if or (eq $dir "/") (hasPrefix (print (trimSuffix "/" $dir) "/") $own) (hasPrefix $own $dir) -}}
      {{- fail (printf "the CNI directory %s of the node has the same path in the installer's container, where %s is needed; allowed: a directory that is apart from it" $dir (trimSuffix "/" $own)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
{{- $variables := include "magic-ip-address.oldVariables" . | fromYaml -}}
{{- range $name, $value := .Values.extraVars -}}
  {{- with get $variables $name -}}
    {{- if not (include "magic-ip-address.text" $value | include "magic-ip-address.decoded") -}}
      {{- fail (printf "extraVars.%s: the agent has a configuration file and does not read this variable (only base64, as chart 0.1.x needed it, is taken over); set config.%s instead" $name .) -}}
    {{- end -}}
  {{- end -}}
  {{- if eq $name "NAMESPACE" -}}
    {{- fail "extraVars.NAMESPACE: the agent has a configuration file and does not read this variable; set config.namespace instead" -}}
  {{- end -}}
  {{- if has $name (list "NODE_NAME" "POD_NAME" "POD_NAMESPACE" "POD_UID" "HOST_IP") -}}
    {{- fail (printf "extraVars.%s: the chart sets this variable" $name) -}}
  {{- end -}}
{{- end -}}
{{- range .Values.config.reservedAddresses -}}
  {{- $parts := splitList "/" . -}}
  {{- $valid := first $parts | include "magic-ip-address.validAddress" -}}
  {{- $most := contains ":" . | ternary 128 32 -}}
  {{- if or (not $valid) (gt (len $parts) 2) (and (eq (len $parts) 2) (or (not (regexMatch "^(0|[1-9][0-9]{0,2})$" (last $parts))) (gt (last $parts | int) $most))) -}}
    {{- fail (printf "config.reservedAddresses: %q is not allowed; allowed: an address, or a prefix such as 169.254.100.0/24" .) -}}
  {{- end -}}
{{- end -}}
{{- $claimed := dict -}}
{{- range include "magic-ip-address.magicIPs" . | fromJsonArray -}}
  {{- $magicIP := . -}}
  {{- include "magic-ip-address.checkAddress" .ipAddress -}}
  {{- $bits := include "magic-ip-address.bits" .ipAddress -}}
  {{- include "magic-ip-address.checkSelector" .selector -}}
  {{- include "magic-ip-address.checkHostInterface" .hostInterface -}}
  {{- include "magic-ip-address.checkHoldFor" .holdFor -}}
  {{- if and .serviceAccount (not $.Values.api.enabled) -}}
    {{- fail (printf "%s: serviceAccount needs the Kubernetes API, which api.enabled=false rules out" .ipAddress) -}}
  {{- end -}}
  {{- if and .owner (not $.Values.api.enabled) -}}
    {{- fail (printf "%s: owner needs the Kubernetes API, which api.enabled=false rules out" .ipAddress) -}}
  {{- end -}}
  {{- if and (eq (default "" .readiness) "require") (not $.Values.api.enabled) -}}
    {{- fail (printf "%s: readiness: require needs the Kubernetes API, which api.enabled=false rules out" .ipAddress) -}}
  {{- end -}}
  {{- range .ports -}}
    {{- $isNumber := regexMatch "^[0-9]+$" (default "1" .targetPort) -}}
    {{- if or (lt (int .port) 1) (gt (int .port) 65535) (and $isNumber (gt (int (default "1" .targetPort)) 65535)) -}}
      {{- fail (printf "%s: port %v -> %v: a port is a number from 1 to 65535" $magicIP.ipAddress .port (default .port .targetPort)) -}}
    {{- end -}}
    {{- if not (or $isNumber $.Values.api.enabled) -}}
      {{- fail (printf "targetPort %q: a name needs the Kubernetes API, which api.enabled=false rules out" .targetPort) -}}
    {{- end -}}
    {{- if not (has (default "tcp" .protocol) (list "tcp" "udp" "sctp")) -}}
      {{- fail (printf "%s: protocol %q is not allowed; allowed: tcp, udp, sctp" $magicIP.ipAddress .protocol) -}}
    {{- end -}}
    {{- $frontend := printf "%s port %v/%s" $bits .port (default "tcp" .protocol) -}}
    {{- if hasKey $claimed $frontend -}}
      {{- fail (printf "%s port %v/%s is configured twice, for %s and for %s; remove one of them" $magicIP.ipAddress .port (default "tcp" .protocol) (get $claimed $frontend) $magicIP.selector) -}}
    {{- end -}}
    {{- $claimed = set $claimed $frontend $magicIP.selector -}}
  {{- end -}}
{{- end -}}
{{- include "magic-ip-address.checkUpgrade" . -}}
{{- end -}}

{{/* The text, if it is an IP address: IPv4 in four numbers; IPv6 of RFC 4291, section 2.2, also with IPv4 at its end. */}}
{{- define "magic-ip-address.validAddress" -}}
{{- $byte := "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])" -}}
{{- $four := printf "%s([.]%s){3}" $byte $byte -}}
{{- $valid := regexMatch (printf "^%s$" $four) . -}}
{{- if contains ":" . -}}
  {{- $groups := regexReplaceAll (printf ":%s$" $four) . ":0:0" -}}
  {{- $count := len (regexFindAll "[0-9A-Fa-f]+" $groups -1) -}}
  {{- if contains "::" $groups -}}
    {{- $valid = and (le $count 7) (regexMatch "^([0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4})*)?::([0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4})*)?$" $groups) -}}
  {{- else -}}
    {{- $valid = regexMatch "^[0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4}){7}$" $groups -}}
  {{- end -}}
{{- end -}}
{{- if $valid -}}{{- . -}}{{- end -}}
{{- end -}}

{{- define "magic-ip-address.checkAddress" -}}
{{- if not (include "magic-ip-address.validAddress" .) -}}
  {{- fail (printf "ipAddress %q is not an IP address; allowed: an IPv4 or IPv6 address such as 169.254.210.210 or fd00:a9fe:d2d2::1" .) -}}
{{- end -}}
{{- $bits := include "magic-ip-address.bits" . -}}
{{- if regexMatch "^(0{32}|01111111.{24}|1110.{28}|1{32}|0{127}.|1{8}.{120})$" $bits -}}
  {{- fail (printf "ipAddress %s is an unspecified, loopback, multicast or broadcast address; allowed: a unicast address that no node has, such as 169.254.210.210" .) -}}
{{- end -}}
{{- if regexMatch "^1111111010.{118}$" $bits -}}
  {{- fail (printf "ipAddress %s is an IPv6 link-local address, which is not routed; allowed: a unique local address such as fd00:a9fe:d2d2::1" .) -}}
{{- end -}}
{{- end -}}

{{/* The grammar of Kubernetes: k8s.io/apimachinery/pkg/labels, Parse. Names and values have at most 63 characters. */}}
{{- define "magic-ip-address.checkSelector" -}}
{{- $word := "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?" -}}
{{- $key := printf "([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?%s" $word -}}
{{- $values := printf "(%s)?\\s*(,\\s*(%s)?\\s*)*" $word $word -}}
{{- $requirement := printf "\\s*(!\\s*%s|%s(\\s*(=|==|!=)\\s*(%s)?|\\s+(in|notin)\\s*[(]\\s*%s[)]|\\s*[<>]\\s*[0-9]{1,18})?)\\s*" $key $key $word $values -}}
{{- $tooLong := regexReplaceAll "[-a-z0-9.]+/" . "" | regexMatch "[-A-Za-z0-9_.]{64}" -}}
{{- if or $tooLong (not (regexMatch (printf "^%s(,%s)*$" $requirement $requirement) .)) -}}
  {{- fail (printf "selector %q is not a Kubernetes label selector; allowed: one that selects by labels, such as app=apm-server or app in (a, b),!canary" .) -}}
{{- end -}}
{{- end -}}

{{- define "magic-ip-address.checkHostInterface" -}}
{{- if not (has (default "" .) (list "" "auto")) -}}
{{- range splitList "," . -}}
{{- if or (not (regexMatch "^\\s*[^\\s/:+*\"]+[+]?\\s*$" .)) (gt (len (trim .)) 15) -}}
  {{- fail (printf "hostInterface %q is not allowed; allowed: auto, or interface names of at most 15 characters, which include a trailing + for a prefix, separated by commas" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "magic-ip-address.checkHoldFor" -}}
{{- if . -}}
{{- $seconds := 0 -}}
{{- range regexFindAll "[0-9]+[smh]" . -1 -}}
  {{- $seconds = add $seconds (mul (regexFind "[0-9]+" . | int) (get (dict "s" 1 "m" 60 "h" 3600) (regexFind "[smh]" .))) -}}
{{- end -}}
{{- if or (not (regexMatch "^([0-9]{1,5}[smh])+$" .)) (lt $seconds 1) (gt $seconds 3600) -}}
  {{- fail (printf "holdFor %q is not allowed; allowed: whole seconds from 1s to 1h" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What an upgrade cannot change, because what the pods before have put on the nodes would stay: SIGTERM is no uninstall,
and the pods after do not know of it. */}}
{{- define "magic-ip-address.checkUpgrade" -}}
{{- $pod := lookup "apps/v1" "DaemonSet" .Release.Namespace (include "magic-ip-address.fullname" .) | dig "spec" "template" "spec" dict -}}
{{- $way := printf "helm uninstall %s --namespace %s, and then install it with the new value" .Release.Name .Release.Namespace -}}
{{- $ours := false -}}
{{- range $pod.containers -}}
  {{- if eq .name "agent" -}}
    {{- $ours = true -}}
    {{- range dig "readinessProbe" "exec" "command" list . -}}
      {{- if and (hasPrefix "--name=" .) (ne . (printf "--name=%s" (include "magic-ip-address.agentName" $))) -}}
        {{- fail (printf "config.name cannot be changed by an upgrade: the rules of %s would stay on the nodes. %s" (trimPrefix "--name=" .) $way) -}}
      {{- end -}}
    {{- end -}}
  {{- else if and (eq .name "installer") (not (include "magic-ip-address.installs" $)) -}}
    {{- fail (printf "cni.enabled cannot be switched off by an upgrade: its entry in the CNI configuration of the nodes would stay. %s" $way) -}}
  {{- end -}}
{{- end -}}
{{- if $ours -}}
  {{- range $pod.volumes -}}
    {{- $path := dig "hostPath" "path" "" . -}}
    {{- if and (eq .name "runtime") (ne $path $.Values.runtimeDir) -}}
      {{- fail (printf "runtimeDir cannot be changed by an upgrade: the entry in the CNI configuration of the nodes names %s. %s" $path $way) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
