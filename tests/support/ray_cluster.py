"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
ROOT = str(Path(__file__).parents[2])


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Two nodes of one processor core each, to which this process is connected; their workers see the tests."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])))
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.add_node(**NODE)
        ray.init(made.address, log_to_driver=False, logging_level="error")
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
