"""JSON schemas of what launchers write: the fields we use, as documented.

JobSet: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 and the pod of
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources; Kueue:
https://kueue.sigs.k8s.io/docs/reference/kueue.v1beta2; SkyPilot:
https://docs.skypilot.co/en/latest/reference/yaml-spec.html. No other field is
allowed, so that a misspelt one is found.
"""

from typing import Any

Schema = dict[str, Any]

TEXT = {'type': 'string', 'minLength': 1}
COUNT = {'type': 'integer', 'minimum': 0}
SOME = {'type': 'integer', 'minimum': 1}
LABELS = {'type': 'object', 'additionalProperties': TEXT}
NAME = {'type': 'string', 'pattern': '^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$'}


def record(needed: Schema, **optional: Schema) -> Schema:
  """An object with these fields and no others."""
  return {
    'type': 'object',
    'properties': needed | optional,
    'required': list(needed),
    'additionalProperties': False,
  }


def rows(item: Schema) -> Schema:
  """An array that is not empty."""
  return {'type': 'array', 'items': item, 'minItems': 1}


def resource(api: str, kind: str, spec: Schema) -> Schema:
  """A Kubernetes object."""
  return record(
    {
      'apiVersion': {'const': api},
      'kind': {'const': kind},
      'metadata': record(
        {'name': NAME}, namespace=NAME, labels=LABELS, annotations=LABELS
      ),
      'spec': spec,
    }
  )


_MOUNT = record({'name': NAME, 'mountPath': TEXT})
_CONTAINER = record(
  {'name': NAME, 'image': TEXT, 'args': rows(TEXT)},
  env=rows(record({'name': TEXT, 'value': {'type': 'string'}})),
  ports=rows(record({'containerPort': {**SOME, 'maximum': 65535}})),
  resources=record(
    {'limits': {'type': 'object', 'additionalProperties': SOME}}
  ),
  volumeMounts=rows(_MOUNT),
)
_VOLUME = record(
  {'name': NAME, 'csi': record({'driver': TEXT, 'volumeAttributes': LABELS})}
)
_POD = record(
  {
    'containers': rows(_CONTAINER),
    'restartPolicy': {'enum': ['Never', 'OnFailure']},
  },
  nodeSelector=LABELS,
  serviceAccountName=NAME,
  terminationGracePeriodSeconds=COUNT,
  volumes=rows(_VOLUME),
)
_EXIT_CODES = record(
  {
    'containerName': NAME,
    'operator': {'enum': ['In', 'NotIn']},
    'values': rows(SOME),
  }
)
_POD_FAILURES = rows(
  record({'action': {'enum': ['FailJob']}, 'onExitCodes': _EXIT_CODES})
)
_JOB = record(
  {
    'parallelism': SOME,
    'completions': SOME,
    'backoffLimit': COUNT,
    'podFailurePolicy': record({'rules': _POD_FAILURES}),
    'template': record(
      {'spec': _POD}, metadata=record({'annotations': LABELS})
    ),
  }
)
_KUEUE = 'kueue.x-k8s.io/v1beta2'
_FLAVOR = record(
  {
    'name': NAME,
    'resources': rows(
      record({'name': TEXT, 'nominalQuota': {'pattern': '^[0-9]+$'}})
    ),
  }
)

KINDS = {
  'JobSet': resource(
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
    record(
      {
        'replicatedJobs': rows(
          record(
            {'name': NAME, 'template': record({'spec': _JOB})}, replicas=SOME
          )
        )
      },
      suspend={'type': 'boolean'},
      failurePolicy=record(
        {
          'maxRestarts': COUNT,
          'rules': rows(
            record(
              {
                'name': {'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
                'action': {'enum': ['FailJobSet']},
                'onJobFailureReasons': rows({'enum': ['PodFailurePolicy']}),
              }
            )
          ),
        }
      ),
    ),
  ),
  'ResourceFlavor': resource(
    _KUEUE, 'ResourceFlavor', record({'nodeLabels': LABELS})
  ),
  'ClusterQueue': resource(
    _KUEUE,
    'ClusterQueue',
    record(
      {
        'resourceGroups': rows(
          record({'coveredResources': rows(TEXT), 'flavors': rows(_FLAVOR)})
        )
      },
      namespaceSelector={'type': 'object'},
      queueingStrategy={'enum': ['StrictFIFO', 'BestEffortFIFO']},
    ),
  ),
  'LocalQueue': resource(_KUEUE, 'LocalQueue', record({'clusterQueue': NAME})),
}

SKYPILOT = record(
  {'name': NAME, 'setup': TEXT, 'run': TEXT},
  workdir=TEXT,
  num_nodes=SOME,
  envs={'type': 'object', 'additionalProperties': {'type': 'string'}},
  file_mounts={
    'type': 'object',
    'additionalProperties': record(
      {'source': TEXT, 'mode': {'enum': ['MOUNT', 'COPY', 'MOUNT_CACHED']}}
    ),
  },
  resources=record(
    {'use_spot': {'type': 'boolean'}},
    infra={'pattern': '^gcp/[a-z0-9-]+/[a-z0-9-]+$'},
    accelerators={'pattern': '^[A-Za-z0-9-]+:[0-9]+$'},
    accelerator_args=record({'runtime_version': TEXT}),
    job_recovery=record({'max_restarts_on_errors': COUNT}),
  ),
)
