"""examples/kubernetes.yaml against the schemas of Kubernetes' API."""

from pathlib import Path

import pytest
import yaml


DOCUMENTS = list(yaml.safe_load_all((Path(__file__).parents[2] / "examples/kubernetes.yaml").read_text()))


@pytest.mark.client(
    "Kubernetes, schema of its API", "kubernetes-validate", group="Training", limit="checked, never run on a cluster"
)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_the_job_is_valid(document):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(document, validate.latest_version(), strict=True)
