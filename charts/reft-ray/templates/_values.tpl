{{- /* Each template changes `document` in place by the values of `root`, and prints nothing. */ -}}

{{- define "reft.account" -}}
{{- with .root.Values.identity.annotations }}{{- $_ := set $.document.metadata "annotations" . }}{{- end -}}
{{- with .root.Values.identity.labels }}
{{- $_ := set $.document.metadata "labels" (merge (deepCopy .) $.document.metadata.labels) }}{{- end -}}
{{- end -}}

{{- define "reft.claim" -}}
{{- $spec := .document.spec -}}
{{- with .root.Values.storage.className }}{{- $_ := set $spec "storageClassName" . }}{{- end -}}
{{- with .root.Values.storage.accessModes }}{{- $_ := set $spec "accessModes" . }}{{- end -}}
{{- with .root.Values.storage.size }}
{{- $_ := set $spec "resources" (dict "requests" (dict "storage" .) "limits" (dict "storage" .)) }}{{- end -}}
{{- end -}}

{{- define "reft.monitor" -}}
{{- with .root.Values.clusterName -}}
{{- $label := dict "action" "replace" "targetLabel" "cluster" "replacement" . -}}
{{- range $endpoint := $.document.spec.podMetricsEndpoints }}
{{- $_ := set $endpoint "relabelings" (append $endpoint.relabelings $label) }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "reft.prometheus" -}}
{{- $peer := index .document.spec.ingress 0 "from" 0 "namespaceSelector" "matchLabels" -}}
{{- $_ := set $peer "kubernetes.io/metadata.name" .root.Values.monitoring.namespace -}}
{{- end -}}

{{- define "reft.egress" -}}
{{- $spec := .document.spec -}}
{{- $metadata := get (dict
  "eks" (dict "cidr" "169.254.170.23/32" "port" 80)
  "gke" (dict "cidr" "169.254.169.254/32" "port" 80)
) .root.Values.identity.metadata -}}
{{- with $metadata -}}
{{- $rule := dict "to" (list (dict "ipBlock" (dict "cidr" .cidr))) "ports" (list (dict "protocol" "TCP" "port" .port)) -}}
{{- $_ := set $spec "egress" (append $spec.egress $rule) }}{{- end -}}
{{- with .root.Values.network.egress }}{{- $_ := set $spec "egress" (concat $spec.egress .) }}{{- end -}}
{{- end -}}

{{- define "reft.service" -}}
{{- $values := .root.Values -}}
{{- $spec := .document.spec -}}
{{- with $values.upgrade }}{{- $_ := set $spec "upgradeStrategy" (mustMergeOverwrite (deepCopy $spec.upgradeStrategy) .) }}{{- end -}}
{{- $cluster := $spec.rayClusterConfig -}}
{{- if $values.redis.address }}
{{- $_ := set $cluster.gcsFaultToleranceOptions "redisAddress" $values.redis.address }}{{- end -}}
{{- $templates := list $cluster.headGroupSpec.template -}}
{{- range $group := $cluster.workerGroupSpecs -}}
{{- $templates = append $templates $group.template -}}
{{- with get $values.groups $group.groupName -}}
{{- range $key := list "replicas" "minReplicas" "maxReplicas" }}
{{- if hasKey $.root.Values.groups $group.groupName }}{{- if hasKey (get $.root.Values.groups $group.groupName) $key }}
{{- $_ := set $group $key (get (get $.root.Values.groups $group.groupName) $key) }}{{- end }}{{- end }}{{- end -}}
{{- $pod := $group.template.spec -}}
{{- with .nodeSelector }}{{- $_ := set $pod "nodeSelector" . }}{{- end -}}
{{- with .tolerations }}{{- $_ := set $pod "tolerations" . }}{{- end -}}
{{- with .resources }}{{- $_ := set (index $pod.containers 0) "resources" . }}{{- end -}}
{{- end -}}
{{- include "reft.models" (dict "pod" $group.template.spec "models" $values.models) -}}
{{- end -}}
{{- range $template := $templates -}}
{{- $pod := $template.spec -}}
{{- with $values.image.pullSecrets }}{{- $_ := set $pod "imagePullSecrets" . }}{{- end -}}
{{- if $values.storage.existingClaim -}}
{{- range $volume := $pod.volumes }}{{- if eq $volume.name "artefacts" }}
{{- $_ := set $volume.persistentVolumeClaim "claimName" $values.storage.existingClaim }}{{- end }}{{- end -}}
{{- end -}}
{{- $container := index $pod.containers 0 -}}
{{- range $name, $value := $values.env }}
{{- $_ := set $container "env" (append $container.env (dict "name" $name "value" $value)) }}{{- end -}}
{{- end -}}
{{- if or $values.serve.args $values.serve.deployments $values.serve.applications -}}
{{- $config := fromYaml $spec.serveConfigV2 -}}
{{- $application := index $config.applications 0 -}}
{{- $_ := set $application "args" (mustMergeOverwrite $application.args $values.serve.args) -}}
{{- range $deployment := $application.deployments }}
{{- with get $values.serve.deployments $deployment.name }}{{- $_ := mustMergeOverwrite $deployment . }}{{- end }}{{- end -}}
{{- $_ := set $config "applications" (concat $config.applications $values.serve.applications) -}}
{{- $_ := set $spec "serveConfigV2" (toYaml $config) -}}
{{- end -}}
{{- end -}}

{{- define "reft.models" -}}
{{- $pod := .pod -}}
{{- $container := index $pod.containers 0 -}}
{{- $starts := list -}}
{{- range $index, $model := .models -}}
{{- if $model.image -}}
{{- $volume := printf "model-%d" $index -}}
{{- $_ := set $pod "volumes" (append $pod.volumes (dict "name" $volume "image" (dict "reference" $model.image))) -}}
{{- $mount := dict "name" $volume "mountPath" $model.to "readOnly" true -}}
{{- $_ := set $container "volumeMounts" (append $container.volumeMounts $mount) -}}
{{- else -}}
{{- $command := list "reft-ray" "models" "download" $model.from $model.to -}}
{{- with $model.sha256 }}{{- $command = concat $command (list "--sha256" .) }}{{- end -}}
{{- $resources := dict "cpu" "1" "memory" "2Gi" "ephemeral-storage" "1Gi" -}}
{{- $starts = append $starts (dict
  "name" (printf "fetch-%d" $index) "image" $container.image "imagePullPolicy" $container.imagePullPolicy
  "command" $command "env" (list (dict "name" "HOME" "value" "/tmp")) "envFrom" $container.envFrom
  "securityContext" $container.securityContext "volumeMounts" $container.volumeMounts
  "resources" (dict "requests" $resources "limits" $resources)) -}}
{{- end -}}
{{- end -}}
{{- with $starts }}{{- $_ := set $pod "initContainers" . }}{{- end -}}
{{- end -}}
