"""Every recording call in the source passes the declared labels; a mistake would raise while serving."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from reft_ray.telemetry import catalog
from reft_ray.telemetry.metric_types import Kind, Metric

SOURCE = Path(__file__).parents[2] / "reft_ray"
METHODS = {"count": Kind.COUNTER, "observe": Kind.HISTOGRAM, "set": Kind.GAUGE}


def mistakes(source: str, where: str) -> Iterator[str]:
    """Errors in calls such as `recorder.count(catalog.FILTER_ROWS, 3, decision="block", ...)`."""
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
                yield f"{at} label {label.name} has no value {value.value!r}"


def test_every_recording_matches_the_catalogue():
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


def recorded(tree: ast.AST) -> set[str]:
    """Catalogue constants passed to a recording method."""
    return {
        call.args[0].attr
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {*METHODS, "add_callback"}
        and call.args
        and isinstance(call.args[0], ast.Attribute)
    }


def looped(tree: ast.AST) -> set[str]:
    """Catalogue constants in a tuple that a loop records."""
    return {
        node.attr
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For)
        for node in ast.walk(loop.iter)
        if isinstance(node, ast.Attribute) and node.attr.isupper()
    }


def test_every_metric_of_the_catalogue_is_recorded():
    """A metric without recording code makes an empty panel and an alert that never fires."""
    callers = [path for path in SOURCE.rglob("*.py") if path.parent.name not in ("telemetry", "boards")]
    trees = [ast.parse(path.read_text()) for path in callers]
    found = set().union(*(recorded(tree) | looped(tree) for tree in trees))
    # Helpers of telemetry count if another package calls them.
    text = "\n".join(path.read_text() for path in callers)
    for helper in ("verdict_metrics.py", "drift.py"):
        for node in ast.parse((SOURCE / "telemetry" / helper).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and re.search(rf"\b{node.name}\(", text):
                found |= recorded(node) | looped(node)
    names = {name for name, value in vars(catalog).items() if isinstance(value, Metric)}
    assert names - found == set()
