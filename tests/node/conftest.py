"""One real node and one S3 server for all tests here; a namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from missions import Bucket, Mission, bucket, start_mission
from node_machine import NodeMachine, node_machine, why_not


@pytest.fixture(scope="session")
def machine() -> Iterator[NodeMachine]:
    """A node with the image."""
    reason = why_not()
    if reason:
        pytest.exit(f"no node: {reason}", returncode=1)
    with node_machine() as made:
        yield made


@pytest.fixture(scope="session")
def s3(machine: NodeMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A store that pods reach."""
    with bucket(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture
def mission(machine: NodeMachine, s3: Bucket, tmp_path: Path) -> Iterator[Mission]:
    """A namespace of a test's own; nothing of it runs afterwards."""
    made = start_mission(machine, s3, tmp_path, "mission")
    yield made
    s3.proxy.mend()
    machine.plane.clear(made.namespace)


@pytest.fixture(scope="session")
def calm(
    machine: NodeMachine, s3: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mission, str]:
    """A run that nobody disturbed: what the disturbed ones are compared with."""
    made = start_mission(machine, s3, tmp_path_factory.mktemp("calm"), "calm")
    run = made.submit("tiny", steps=100)
    assert made.over(run) == "Complete", made.ask("why", run)
    return made, run
