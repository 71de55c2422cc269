"""Finding the cluster: kubeconfig and context, or the pod's own service account."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from job.errors import ExitCode, JobError
from k8s.cluster import Cluster


def connect(*, context: str | None = None, namespace: str | None = None) -> Cluster:
    """Open the cluster of the kubeconfig's context, or the one that this pod runs in.

    Raises:
        JobError: 66 for no kubeconfig or no such context, 77 for credentials that can't be had.
    """
    from kubernetes.client.api_client import ApiClient
    from kubernetes.client.configuration import Configuration
    from kubernetes.config.config_exception import ConfigException
    from kubernetes.config.kube_config import load_kube_config

    # Retries are ours to tell of, not the connection pool's.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    configuration = Configuration()
    paths = _kubeconfigs()
    try:
        if paths:
            context, by_itself = _pick_context(paths, context)
            with _plugin_errors_raised():
                load_kube_config(
                    config_file=os.pathsep.join(map(str, paths)),
                    context=context,
                    client_configuration=configuration,
                    persist_config=False,
                )
        else:
            by_itself = _in_cluster(configuration)
    except (ConfigException, OSError, ValueError) as error:
        what = f"its credentials can't be had: {' '.join(str(error).split())[:300]}"
        do = "log in again, or install the credential plugin it names"
        raise JobError(ExitCode.NOT_ALLOWED, "kubeconfig", what, do) from error
    return Cluster(ApiClient(configuration), namespace or by_itself or "lora-job")


class _Heard(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _plugin_errors_raised() -> Iterator[None]:
    """Raise what the client only logs: a credential plugin that is absent, or that fails.

    Without it we would go on as nobody, and be told that nobody may do this.
    """
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(heard)
    if heard.said:
        raise ValueError(heard.said[-1])


def _kubeconfigs() -> list[Path]:
    named = os.environ.get("KUBECONFIG")
    paths = [Path(it) for it in named.split(os.pathsep)] if named else []
    paths = paths or [Path.home() / ".kube" / "config"]
    found = [path for path in paths if path.is_file()]
    if not found and (named or "KUBERNETES_SERVICE_HOST" not in os.environ):
        where = named or str(paths[0])
        do = "get one from your provider (gcloud, aws eks or az aks get-credentials), or set KUBECONFIG"
        raise JobError(ExitCode.NOT_FOUND, where, "there is no kubeconfig", do)
    return found


def _pick_context(paths: list[Path], context: str | None) -> tuple[str, str | None]:
    """Return the context to use, by kubectl's rules, and its namespace.

    Raises:
        JobError: 66 if there is no such context, 78 for a file that is no kubeconfig.
    """
    contexts: dict[str, dict[str, Any]] = {}
    current = None
    for path in paths:
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            contexts = {it["name"]: it["context"] for it in raw.get("contexts") or []} | contexts
            current = current or raw.get("current-context")
        except (
            yaml.YAMLError,
            UnicodeDecodeError,
            AttributeError,
            LookupError,
            TypeError,
        ) as error:
            do = "mend it, or write it anew with your provider's get-credentials"
            raise JobError(ExitCode.CONFIG, str(path), "is no kubeconfig", do) from error
    name = context or current
    if name not in contexts:
        what = f"there is no context {name}" if name else "no current context is set"
        do = f"use one of: {', '.join(contexts) or 'none is there'}"
        raise JobError(ExitCode.NOT_FOUND, str(paths[0]), what, do)
    return name, contexts[name].get("namespace")


def _in_cluster(configuration: Any) -> str | None:
    from kubernetes.config.incluster_config import load_incluster_config

    load_incluster_config(client_configuration=configuration)
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return account.read_text(encoding="utf-8").strip() if account.is_file() else None
