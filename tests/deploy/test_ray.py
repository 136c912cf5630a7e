"""Evaluation on a Ray cluster: the file that makes one, by Ray's own schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

from tests.deploy.conftest import DEPLOY


def test_ray_takes_the_cluster_file():
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text()), schema)
