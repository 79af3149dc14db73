"""Every recording in the source passes the labels that the catalogue declares: a mistake would raise while serving."""

import ast
from collections.abc import Iterator
from pathlib import Path

from reft_ray.telemetry import catalog
from reft_ray.telemetry.metric import Kind, Metric

SOURCE = Path(__file__).parents[2] / "reft_ray"
METHODS = {"count": Kind.COUNTER, "observe": Kind.HISTOGRAM, "set": Kind.GAUGE}


def mistakes(source: str, where: str) -> Iterator[str]:
    """What is wrong with calls such as `recorder.count(catalog.FILTER_ROWS, 3, decision="block", ...)`."""
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in METHODS):
            continue
        if not (call.args and isinstance(call.args[0], ast.Attribute) and call.args[0].attr.isupper()):
            continue
        metric = getattr(catalog, call.args[0].attr, None)
        at = f"{where}:{call.lineno}: {call.func.attr}({call.args[0].attr})"
        if not isinstance(metric, Metric):
            yield f"{at} is not in the catalogue"
            continue
        if metric.kind is not METHODS[call.func.attr]:
            yield f"{at} is a {metric.kind}"
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if None not in given and given.keys() != set(metric.label_names):
            yield f"{at} takes {sorted(metric.label_names)}, got {sorted(map(str, given))}"
        for label in metric.labels:
            value = given.get(label.name)
            if label.values and isinstance(value, ast.Constant) and value.value not in label.values:
                yield f"{at} label {label.name} does not know {value.value!r}"


def test_every_recording_fits_the_catalogue():
    found = [
        line for path in SOURCE.rglob("*.py") for line in mistakes(path.read_text(), str(path.relative_to(SOURCE)))
    ]
    assert found == []


def test_mistakes_are_found():
    wrong = """
r.count(catalog.NO_SUCH_METRIC)
r.set(catalog.FILTER_RETRIES, 1)
r.count(catalog.FILTER_TRUNCATIONS)
r.count(catalog.FILTER_TRUNCATIONS, stream="canal")
r.count(catalog.FILTER_TRUNCATIONS, 2, stream=stream)
r.count(catalog.FILTER_TRUNCATIONS, **labels)
"""
    assert len(list(mistakes(wrong, "wrong.py"))) == 4
