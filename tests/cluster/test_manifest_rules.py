"""The CRDs' own CEL rules, evaluated: an API server would refuse what breaks them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    # Importing celpy touches deprecated names of its own dependencies.
    warnings.simplefilter("ignore")
    import celpy
    from celpy.adapter import json_to_cel

Document = dict[str, Any]
Broken = list[str]


def broken(schema: Document, value: Any, old: Any, where: str = "") -> Iterator[str]:
    """Rules of a schema, at every depth, that a value breaks when it takes the place of an old one (None: is new)."""
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = "oldSelf" in rule["rule"]
        if not (transition and old is None) and not holds(rule["rule"], value, old):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from broken(inner, item, old.get(name) if isinstance(old, dict) else None, f"{where}/{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            # Lists without keys have no old items to compare with.
            yield from broken(schema["items"], item, None, f"{where}/{index}")


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


def test_no_document_breaks_a_rule(all_documents: list[tuple[str, Document]], ray_kinds: dict[str, Document]) -> None:
    checked = [(part, d) for part, d in all_documents if d["kind"] in ray_kinds]
    assert checked
    assert all(rules_in(ray_kinds[d["kind"]]) for _, d in checked)
    for part, document in checked:
        # As it is created, and as it is applied again.
        assert list(broken(ray_kinds[document["kind"]], document, None, part)) == []
        assert list(broken(ray_kinds[document["kind"]], document, document, part)) == []


def test_an_upgrade_may_not_change_what_is_immutable(manifests: Any, ray_kinds: dict[str, Document]) -> None:
    new = manifests.one("overlays/production", "RayService")
    old = manifests.one("overlays/production", "RayService")
    new["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["backend"] = "rocksdb"
    assert any("backend is immutable" in line for line in broken(ray_kinds["RayService"], new, old))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"managedBy": "somebody"}, "managedBy field value must be either"),
        ({"deletionStrategy": {"onSuccess": {}, "onFailure": {}, "deletionRules": []}}, ""),
        ({"deletionStrategy": {"onSuccess": {}}}, ""),
    ],
)
def test_the_rules_can_be_broken(ray_kinds: dict[str, Document], spec: Document, message: str) -> None:
    found = list(broken(ray_kinds["RayJob"], {"spec": spec}, None))
    assert found
    assert message in found[0]
