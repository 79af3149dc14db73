"""Evaluate the CEL validation rules of the CRDs, as an API server does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    # Importing celpy raises deprecation warnings.
    warnings.simplefilter("ignore")
    import celpy
    from celpy.adapter import json_to_cel

Document = dict[str, Any]


def violations(schema: Document, value: Any, old: Any, where: str = "") -> Iterator[str]:
    """Rules of a schema, at every depth, that a value violates when it replaces `old` (None: creation)."""
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = "oldSelf" in rule["rule"]
        if not (transition and old is None) and not holds(rule["rule"], value, old):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from violations(inner, item, old.get(name) if isinstance(old, dict) else None, f"{where}/{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            # List items without keys have no old value.
            yield from violations(schema["items"], item, None, f"{where}/{index}")


def holds(rule: str, value: Any, old: Any) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": json_to_cel(value), "oldSelf": json_to_cel(old)}))


def rules_in(schema: Any) -> int:
    if isinstance(schema, list):
        return sum(map(rules_in, schema))
    if not isinstance(schema, dict):
        return 0
    return len(schema.get("x-kubernetes-validations", ())) + sum(map(rules_in, schema.values()))


@pytest.fixture(scope="session")
def ray_kinds(crd_schemas: dict[tuple[str, str], Document]) -> dict[str, Document]:
    return {kind: schema for (version, kind), schema in crd_schemas.items() if version == "ray.io/v1"}


def test_no_document_violates_a_rule(all_documents: list[tuple[str, Document]], ray_kinds: dict[str, Document]) -> None:
    checked = [(part, d) for part, d in all_documents if d["kind"] in ray_kinds]
    assert checked
    assert all(rules_in(ray_kinds[d["kind"]]) for _, d in checked)
    for part, document in checked:
        # On creation, and on a second apply.
        assert list(violations(ray_kinds[document["kind"]], document, None, part)) == []
        assert list(violations(ray_kinds[document["kind"]], document, document, part)) == []


def test_an_upgrade_must_not_change_immutable_fields(manifests: Any, ray_kinds: dict[str, Document]) -> None:
    new = manifests.one("overlays/production", "RayService")
    old = manifests.one("overlays/production", "RayService")
    new["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["backend"] = "rocksdb"
    assert any("backend is immutable" in line for line in violations(ray_kinds["RayService"], new, old))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"managedBy": "unknown"}, "managedBy field value must be either"),
        ({"deletionStrategy": {"onSuccess": {}, "onFailure": {}, "deletionRules": []}}, ""),
        ({"deletionStrategy": {"onSuccess": {}}}, ""),
    ],
)
def test_violations_are_found(ray_kinds: dict[str, Document], spec: Document, message: str) -> None:
    found = list(violations(ray_kinds["RayJob"], {"spec": spec}, None))
    assert found
    assert message in found[0]
