"""What of a JobSet launch/gke.yaml uses, as a JSON schema: names and types as in the resource
definition of JobSet v1alpha2. That itself has 0.8 MB, of which we use thirty fields; and there
unknown fields pass, here they are errors, so a misspelt one is found without a cluster.
"""

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
LABELS = {"type": "object", "additionalProperties": TEXT}


def closed(required: str = "", **fields):
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(item):
    return {"type": "array", "items": item, "minItems": 1}


CONTAINER = closed(
    "name image command args resources",
    name={"const": "train"},
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    env=many(closed("name value", name=TEXT, value=TEXT)),
    resources=closed(
        "requests limits",
        requests={"type": "object", "additionalProperties": COUNT},
        limits={"type": "object", "additionalProperties": COUNT},
    ),
)
POD = closed(
    "restartPolicy nodeSelector containers",
    restartPolicy={"const": "Never"},  # podFailurePolicy asks for it
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=LABELS,
    containers=many(CONTAINER) | {"maxItems": 1},
)
EXIT_CODES = closed(
    "operator values",
    containerName={"const": "train"},
    operator={"enum": ["In", "NotIn"]},
    values=many({"type": "integer", "minimum": 1}),
)
CONDITIONS = many(closed("type", type=TEXT, status={"enum": ["True", "False", "Unknown"]}))
POD_FAILURE = closed(
    "action",
    action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    onExitCodes=EXIT_CODES,
    onPodConditions=CONDITIONS,
)
JOB = closed(
    "parallelism completions backoffLimit template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit={"const": 0},
    podFailurePolicy=closed("rules", rules=many(POD_FAILURE)),
    template=closed("spec", spec=POD),
)
FAILURE = closed(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=many(
        {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"]}
    ),
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(
        "name",
        name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$"},
        annotations=LABELS,
    ),
    spec=closed(
        "failurePolicy replicatedJobs",
        failurePolicy=closed("maxRestarts", maxRestarts=COUNT, rules=many(FAILURE)),
        replicatedJobs=many(
            closed("name template", name=TEXT, replicas=COUNT, template=closed("spec", spec=JOB))
        ),
    ),
)
