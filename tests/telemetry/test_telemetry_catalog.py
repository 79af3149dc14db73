"""Conventions of the metric catalogue."""

import pytest

from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.metric_types import Kind, Label, Metric, Unit


def test_names_are_unique_and_have_the_prefix():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("reft_") for name in names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_contain_units_and_cardinality_is_bounded(metric):
    if metric.unit in (Unit.SECONDS, Unit.BYTES, Unit.NATS, Unit.INFO) and metric.name != "reft_train_loss":
        assert metric.unit in metric.name
    series = 1
    for label in metric.labels:
        series *= max(1, len(label.values))
    assert series <= 500
    assert not {"user", "row", "job", "text", "prompt", "id"} & set(metric.label_names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Bad-name"}, "must match"),
        ({"name": "x_count"}, "reserved"),
        ({"name": "x"}, "end in _total"),
        ({"name": "x_total", "kind": Kind.GAUGE}, "end in _total"),
        ({"name": "x", "kind": Kind.HISTOGRAM}, "have buckets"),
        ({"name": "x", "kind": Kind.HISTOGRAM, "buckets": (2.0, 1.0)}, "must increase"),
        ({"name": "x", "kind": Kind.HISTOGRAM, "buckets": (0.0, 1.0)}, "positive"),
        ({"help": "No full stop"}, "sentence"),
    ],
)
def test_a_metric_that_breaks_a_convention_is_refused(fields, message):
    good = {"name": "x_total", "kind": Kind.COUNTER, "unit": Unit.COUNT, "help": "Things."}
    Metric(**good)
    with pytest.raises(ValueError, match=message):
        Metric(**{**good, **fields})


@pytest.mark.parametrize("fields", [{}, {"values": ("a",), "limit": 3}])
def test_labels_have_either_values_or_a_limit(fields):
    with pytest.raises(ValueError, match="either its values or a limit"):
        Label("x", **fields)
