{{- define "finetune.fullname" -}}
{{- if contains "finetune-operator" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else if eq .Release.Name "finetune" -}}
finetune-operator
{{- else -}}
{{- printf "%s-finetune-operator" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "finetune.selectorLabels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "finetune.labels" -}}
{{ include "finetune.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "finetune.image" -}}
{{- $image := index .root.Values.images .name -}}
{{- $path := $image.repository -}}
{{- if .root.Values.images.registry -}}
{{- $path = printf "%s/%s" (trimSuffix "/" .root.Values.images.registry) $image.repository -}}
{{- end -}}
{{- printf "%s:%s" $path (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}

{{- define "finetune.tlsSecret" -}}
{{- default (printf "%s-tls" (include "finetune.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- /* Whether free GPUs are counted: "true" or nothing. */ -}}
{{- define "finetune.countsFreeGPUs" -}}
{{- if kindIs "bool" .Values.operator.countFreeGPUs -}}
{{- if .Values.operator.countFreeGPUs -}}true{{- end -}}
{{- else if not .Values.watchNamespaces -}}
true
{{- end -}}
{{- end -}}

{{- /* Rights on the objects of jobs. No Secret is ever read: pods mount what they need themselves. */ -}}
{{- define "finetune.jobRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  # patch: the finalizer of output.deletionPolicy: Delete.
  verbs: [get, list, watch, delete, patch]
- apiGroups: [finetune.dev]
  resources: [adaptercombinations]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status, adaptercombinations/status]
  verbs: [patch]
# Where owner references are guarded (OwnerReferencesPermissionEnforcement), children need it.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers, adaptercombinations/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create]
# By which the pods of a training on several nodes find each other.
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
# list: the Job controller's words about a Job that gets no pod, asked for by that Job's UID.
- apiGroups: [""]
  resources: [events]
  verbs: [create, list]
{{- end -}}
