{{/*
Whether the plugin is installed. Not on OpenShift, unless a directory is given: CRI-O reads /etc/kubernetes/cni/net.d there, whose
only file is that of Multus, one plugin and no chain; and no plugin of /etc/cni/multus/net.d is executed for every pod.
*/}}
{{- define "magic-ip-address.installs" -}}
{{- if and .Values.cni.enabled (or (ne .Values.cni.preset "openshift") .Values.cni.confDir) -}}true{{- end -}}
{{- end -}}

{{/* Directories of the node by preset, as JSON. */}}
{{- define "magic-ip-address.cniDirs" -}}
{{- $presets := dict
  "default" (dict "bin" "/opt/cni/bin" "conf" "/etc/cni/net.d")
  "k3s" (dict "bin" "/var/lib/rancher/k3s/data/cni" "conf" "/var/lib/rancher/k3s/agent/etc/cni/net.d")
  "microk8s" (dict "bin" "/var/snap/microk8s/current/opt/cni/bin" "conf" "/var/snap/microk8s/current/args/cni-network")
  "gke" (dict "bin" "/home/kubernetes/bin" "conf" "/etc/cni/net.d")
  "openshift" (dict "bin" "/var/lib/cni/bin" "conf" "/etc/kubernetes/cni/net.d")
-}}
{{- $preset := get $presets .Values.cni.preset -}}
{{- dict "bin" (default $preset.bin .Values.cni.binDir) "conf" (default $preset.conf .Values.cni.confDir) | toJson -}}
{{- end -}}

{{/* What the commands of both containers share. */}}
{{- define "magic-ip-address.commonArgs" -}}
- --config=/etc/magic-ip-address/config.yaml
- --runtime-dir={{ .Values.runtimeDir }}
{{- if .Values.api.enabled }}
- --daemonset={{ .Release.Namespace }}/{{ include "magic-ip-address.fullname" . }}
{{- else }}
- --no-api
{{- end }}
- --log-level={{ include "magic-ip-address.logLevel" . }}
{{- end -}}

{{/* The directories below runtimeDir that containers write, as JSON. */}}
{{- define "magic-ip-address.runtimeDirs" -}}
{{- $name := include "magic-ip-address.agentName" . -}}
{{- dict
  "agent" (printf "%s/agents/%s" .Values.runtimeDir $name)
  "installer" (printf "%s/install/%s" .Values.runtimeDir $name)
  "plugin" (printf "%s/plugin" .Values.runtimeDir)
| toJson -}}
{{- end -}}

{{/* The runtime directory, read-only but for the directories `own`. */}}
{{- define "magic-ip-address.runtimeMounts" -}}
{{- $directories := include "magic-ip-address.runtimeDirs" .root | fromJson -}}
- name: runtime
  mountPath: {{ .root.Values.runtimeDir }}
  readOnly: true
{{- range .own }}
- name: runtime-{{ . }}
  mountPath: {{ get $directories . }}
{{- end }}
{{- end -}}

{{/*
Whether Cilium's settings are mounted. No type of hostPath leaves a missing directory alone, and a pod that needs it would not start
without Cilium: hence not in clusters without Cilium. /run, which is there always, has the sockets of the container runtime.
*/}}
{{- define "magic-ip-address.ciliumState" -}}
{{- if and .Values.ciliumStateDir (or (eq .Values.config.dataPlane "cilium") (.Capabilities.APIVersions.Has "cilium.io/v2")) -}}true{{- end -}}
{{- end -}}

{{- define "magic-ip-address.tokenMount" -}}
- name: api-access
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{- define "magic-ip-address.logLevel" -}}
{{- ternary "debug" "info" (has ((include "magic-ip-address.effectiveConfig" . | fromJson).verbose | toString) (list "true" "1")) -}}
{{- end -}}

{{/* Where the agent serves metrics. Brackets are right for both families. */}}
{{- define "magic-ip-address.metricsAddress" -}}
[{{ default "$(HOST_IP)" .Values.metrics.bindAddress }}]:{{ .Values.metrics.port | int }}
{{- end -}}

{{/* The security context of both containers. They are root, since host directories and netlink are root's. */}}
{{- define "magic-ip-address.confinement" -}}
runAsUser: 0
runAsGroup: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
seccompProfile:
  type: RuntimeDefault
{{- with .Values.appArmorProfile }}
appArmorProfile:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $seLinux := .Values.seLinuxOptions }}
{{- if and (not $seLinux) (eq .Values.cni.preset "openshift") }}
{{- $seLinux = dict "type" "spc_t" }}
{{- end }}
{{- with $seLinux }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where pods run, those of `helm test` too. */}}
{{- define "magic-ip-address.scheduling" -}}
nodeSelector:
  {{- merge (include "magic-ip-address.texts" .Values.nodeSelector | fromYaml) (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "magic-ip-address.pullSecrets" -}}
{{- with include "magic-ip-address.imagePullSecrets" . | fromJsonArray -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}
