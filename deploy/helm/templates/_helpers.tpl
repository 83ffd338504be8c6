{{- define "convoy.name" -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "convoy.selector" -}}
app.kubernetes.io/name: convoy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "convoy.labels" -}}
{{ include "convoy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "convoy.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "convoy.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "convoy.claim" -}}
{{- .Values.repository.volumeClaim.existing | default (printf "%s-models" (include "convoy.name" .)) -}}
{{- end -}}

{{- /* repository, tag and digest of an image, by a dict of the image and the chart's version */ -}}
{{- define "convoy.image" -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .version) -}}
{{- with .image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- /* what the server and the publish Job share: no rights, and numbers that the kubelet can check */ -}}
{{- define "convoy.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "convoy.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "convoy.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end -}}
{{- end -}}

{{- /* the Secrets that are mounted, by the name of their folder */ -}}
{{- define "convoy.secrets" -}}
{{- with .Values.tls.secret }}
tls: {{ . }}
{{- end }}
{{- with .Values.tls.clientCaSecret }}
client-ca: {{ . }}
{{- end }}
{{- with .Values.tokens.secret }}
tokens: {{ . }}
{{- end }}
{{- with .Values.signatures.publicKeySecret }}
signatures: {{ . }}
{{- end }}
{{- end -}}
