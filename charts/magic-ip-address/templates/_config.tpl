{{/*
The magic IPs as a JSON list, so that templates can look at them: those of config.magicIPs, and in front of them the
one of the keys beside it, unless config.magicIPs is there and config.selector is still the placeholder.
What is empty is left out. Numbers and booleans may have come as strings (--set-string).
*/}}
{{- define "magic-ip-address.magicIPs" -}}
{{- $config := include "magic-ip-address.effectiveConfig" . | fromJson -}}
{{- $listed := default list $config.magicIPs -}}
{{- if or (not $listed) (ne (toString $config.selector) "app=myapp") -}}
{{- $flat := omit $config "magicIPs" "reservedAddresses" "dataPlane" "name" "pollInterval" "verbose" "port" "targetPort" "protocol" -}}
{{- $listed = prepend $listed (set $flat "ports" (list (pick $config "port" "targetPort" "protocol"))) -}}
{{- end -}}
{{- $magicIPs := list -}}
{{- range $raw := $listed -}}
  {{- $magicIP := dict "namespace" (default $.Release.Namespace $raw.namespace) -}}
  {{- range $key := list "ipAddress" "selector" "owner" "serviceAccount" "hostInterface" "readiness" "distribution" "noEndpoint" "holdFor" -}}
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

{{/*
The rights to read owners: of the magic IPs that serve .namespace, or of all where it is "*". A Deployment owns pods by
ReplicaSets, whose names are not known before.
*/}}
{{- define "magic-ip-address.ownerRules" -}}
{{- $groups := dict "Job" "batch" "ReplicationController" "" -}}
{{- $names := dict -}}
{{- $replicaSets := false -}}
{{- $namespace := .namespace -}}
{{- range include "magic-ip-address.magicIPs" .root | fromJsonArray -}}
  {{- if and .owner (or (eq $namespace "*") (eq $namespace .namespace)) -}}
    {{- $parts := splitList "/" .owner -}}
    {{- $kind := index $parts (sub (len $parts) 2) -}}
    {{- $group := first $parts -}}
    {{- if eq (len $parts) 2 -}}{{- $group = hasKey $groups $kind | ternary (get $groups $kind) "apps" -}}{{- end -}}
    {{- $resource := regexReplaceAll "ys$" (regexReplaceAll "ss$" (printf "%ss" (lower $kind)) "ses") "ies" -}}
    {{- $key := printf "%s/%s" $group $resource -}}
    {{- $names = set $names $key (append (get $names $key | default list) (last $parts) | uniq) -}}
    {{- if eq $key "apps/deployments" -}}{{- $replicaSets = true -}}{{- end -}}
  {{- end -}}
{{- end -}}
{{- range keys $names | sortAlpha }}
- apiGroups: [{{ splitList "/" . | first | quote }}]
  resources: [{{ splitList "/" . | last }}]
  resourceNames: {{ get $names . | sortAlpha | toJson }}
  verbs: [get]
{{- end }}
{{- if $replicaSets }}
- apiGroups: ["apps"]
  resources: [replicasets]
  verbs: [get]
{{- end }}
{{- end -}}

{{/* The agent's configuration file. */}}
{{- define "magic-ip-address.config" -}}
name: {{ include "magic-ip-address.agentName" . | quote }}
pollInterval: {{ (include "magic-ip-address.effectiveConfig" . | fromJson).pollInterval | default 5 | int }}s
{{- if ne .Values.config.dataPlane "auto" }}
dataPlane: {{ .Values.config.dataPlane }}
{{- end }}
{{- with .Values.config.reservedAddresses }}
reservedAddresses:
{{ toYaml . | indent 2 }}
{{- end }}
magicIPs:
{{ include "magic-ip-address.magicIPs" . | fromJsonArray | toYaml | indent 2 }}
{{- end -}}

{{/* The bits of a valid address, as text: 32 for IPv4, also for IPv4 in IPv6 (::ffff:0:0/96), else 128. */}}
{{- define "magic-ip-address.bits" -}}
{{- $nibbles := dict "0" "0000" "1" "0001" "2" "0010" "3" "0011" "4" "0100" "5" "0101" "6" "0110" "7" "0111" "8" "1000" "9" "1001" "a" "1010" "b" "1011" "c" "1100" "d" "1101" "e" "1110" "f" "1111" -}}
{{- $hex := "" -}}
{{- $text := . -}}
{{- with regexFind "[0-9]+[.][0-9.]+$" . -}}
  {{- range splitList "." . -}}
    {{- $hex = printf "%s%02x" $hex (int .) -}}
  {{- end -}}
  {{- $text = printf "%s%s:%s" (trimSuffix . $text) (substr 0 4 $hex) (substr 4 8 $hex) -}}
{{- end -}}
{{- if contains ":" . -}}
  {{- $halves := splitList "::" $text -}}
  {{- $left := first $halves | splitList ":" | compact -}}
  {{- $right := rest $halves | join ":" | splitList ":" | compact -}}
  {{- $zeros := repeat (add (len $left) (len $right) | sub 8 | int) "0 " | splitList " " | compact -}}
  {{- $hex = "" -}}
  {{- range concat $left $zeros $right -}}
    {{- $hex = printf "%s%s" $hex (printf "0000%s" . | lower | trunc -4) -}}
  {{- end -}}
  {{- $hex = regexReplaceAll "^0{20}ffff" $hex "" -}}
{{- end -}}
{{- range splitList "" $hex -}}{{- get $nibbles . -}}{{- end -}}
{{- end -}}

{{/*
What each address is reserved for that a magic IP has, as JSON: by clouds and cluster components, or by
config.reservedAddresses. The agent does not serve them unless allowReserved is set.
*/}}
{{- define "magic-ip-address.reserved" -}}
{{- $prefixes := dict -}}
{{- $known := .Files.Get "files/reserved.yaml" | fromYaml -}}
{{- $known = set $known "config.reservedAddresses" (default list .Values.config.reservedAddresses) -}}
{{- range $use, $texts := $known -}}
  {{- range $texts -}}
    {{- $parts := splitList "/" . -}}
    {{- $bits := first $parts | include "magic-ip-address.bits" -}}
    {{- $length := rest $parts | first | default (len $bits) | int -}}
    {{- if and (contains ":" .) (eq (len $bits) 32) (rest $parts) -}}{{- /* IPv4, mapped to IPv6 */ -}}
      {{- $length = sub $length 96 | int -}}
    {{- end -}}
    {{- if ge $length 0 -}}
      {{- $prefixes = set $prefixes (substr 0 $length $bits) $use -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $reserved := dict -}}
{{- range include "magic-ip-address.magicIPs" . | fromJsonArray -}}
  {{- $magicIP := .ipAddress -}}
  {{- $bits := include "magic-ip-address.bits" $magicIP -}}
  {{- range $length := untilStep 0 (add (len $bits) 1 | int) 1 -}}
    {{- with get $prefixes (substr 0 $length $bits) -}}
      {{- $reserved = set $reserved $magicIP . -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- toJson $reserved -}}
{{- end -}}
