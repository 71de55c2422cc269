"""A control plane for each Kubernetes minor, shared by the tests of one worker.

With pytest-xdist, ``--dist loadgroup`` keeps all tests of a minor on one worker.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from controlplane import MINORS, ControlPlane, control_plane, programs


@pytest.fixture(
    scope="session",
    params=[pytest.param(minor, marks=pytest.mark.xdist_group(minor)) for minor in MINORS],
)
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A running control plane."""
    if programs(request.param) is None:
        pytest.fail(f"Kubernetes {request.param} is not built; run tests/cluster/build.sh")
    with control_plane(tmp_path_factory.mktemp(f"plane-{request.param}"), request.param) as plane:
        yield plane


@pytest.fixture
def controllers(plane: ControlPlane) -> ControlPlane:
    """A control plane in which Jobs become pods (envtest's binaries have no controllers)."""
    if not plane.has_controllers:
        pytest.skip("no kube-controller-manager in KUBEBUILDER_ASSETS")
    return plane


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace that enforces Pod Security's level restricted.

    Afterwards nothing in it runs any more, and nodes that the test added are gone.
    """
    name = plane.namespace()
    yield name
    plane.clear(name)
