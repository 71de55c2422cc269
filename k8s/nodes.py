"""Whether a node takes a pod, as the scheduler would see it. Pure."""

from __future__ import annotations

from k8s.render import Object

PASSING = ("node.kubernetes.io", "node.cloudprovider", "ToBeDeletedBy", "karpenter.sh/")


def refusal(pod: Object, node: Object) -> str | None:
    """Return why a node that has the pod's nodeSelector does not take it, or None if it does."""
    if node["spec"].get("unschedulable"):
        return "cordoned"
    labels = node["metadata"].get("labels") or {}
    terms = _terms(pod)
    if terms and not any(all(_holds(one, labels) for one in term) for term in terms):
        return f"without {required(pod)}"
    taint = _refusing(pod, node)
    return f"tainted {taint['key']}={taint.get('value', '')}" if taint else None


def required(pod: Object) -> str:
    """Return the terms of a pod's required node affinity in words; empty if it has none."""
    return " or ".join(" and ".join(map(_said, term)) for term in _terms(pod))


def _terms(pod: Object) -> list[list[Object]]:
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    found = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    return [term.get("matchExpressions") or [] for term in found.get("nodeSelectorTerms", [])]


def _holds(expression: Object, labels: Object) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return True  # Gt and Lt: none of our manifests has them


def _said(expression: Object) -> str:
    parts = (expression["key"], expression["operator"], ",".join(expression.get("values") or []))
    return " ".join(filter(None, parts))


def _refusing(pod: Object, node: Object) -> Object | None:
    """Return a taint that the pod does not tolerate; those of a node's coming and going pass."""
    for taint in node["spec"].get("taints") or []:
        hard = taint["effect"] != "PreferNoSchedule"
        lasting = not taint["key"].startswith(PASSING)
        if hard and lasting and not tolerates(pod.get("tolerations") or [], taint):
            return taint
    return None


def tolerates(tolerations: list[Object], taint: Object) -> bool:
    """Return whether one of the tolerations answers a taint."""
    for one in tolerations:
        if one.get("effect") not in (None, "", taint["effect"]):
            continue
        if one.get("operator") == "Exists" and one.get("key") in (None, "", taint["key"]):
            return True
        same = one.get("key") == taint["key"] and one.get("value", "") == taint.get("value", "")
        if same and one.get("operator", "Equal") == "Equal":
            return True
    return False
