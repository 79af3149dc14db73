import pytest

from reft_ray.evaluation.gate import Bound, Gate, Limit
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.suite import Evaluation


def evaluation(**values):
    return Evaluation({name.replace("__", "/"): Measure(value, value, value, 100) for name, value in values.items()})


@pytest.mark.parametrize(
    ("bound", "value", "student", "base", "passed"),
    [
        (Bound.AT_MOST, 5.0, 5.0, 0.0, True),
        (Bound.AT_MOST, 5.0, 5.1, 0.0, False),
        (Bound.AT_LEAST, 90.0, 90.0, 0.0, True),
        (Bound.AT_LEAST, 90.0, 89.9, 99.0, False),
        (Bound.RISE_AT_MOST, 2.0, 12.0, 10.0, True),
        (Bound.RISE_AT_MOST, 2.0, 12.5, 10.0, False),
        (Bound.DROP_AT_MOST, 1.0, 89.0, 90.0, True),
        (Bound.DROP_AT_MOST, 1.0, 88.0, 90.0, False),
        (Bound.DROP_AT_MOST, 1.0, 99.0, 90.0, True),
        (Bound.AT_MOST, 5.0, float("nan"), 0.0, False),
        (Bound.RISE_AT_MOST, 5.0, 0.0, float("nan"), False),
    ],
)
def test_bounds(bound, value, student, base, passed):
    result = Gate([Limit("harmful_score", bound, value)]).check(
        evaluation(harmful_score=student), evaluation(harmful_score=base)
    )
    assert result.passed is passed
    assert len(result.failures) == (not passed)
    assert result.checks[0].limit == value


def test_a_measure_without_a_number_does_not_pass():
    limit = Limit("harmful_score", Bound.AT_MOST, 5.0)
    result = Gate([limit]).check(evaluation(over_refusal=0.0), evaluation())
    assert not result.passed
    assert str(result.checks[0]) == "harmful_score not measured (base not measured) at_most 5.0: failed"


def test_a_delta_needs_the_base():
    limit = Limit("harmful_score", Bound.RISE_AT_MOST, 100.0)
    assert not Gate([limit]).check(evaluation(harmful_score=0.0), evaluation()).passed


def test_a_limit_applies_to_every_task_even_if_the_student_lacks_it():
    gate = Gate([Limit("finetune_accuracy", Bound.DROP_AT_MOST, 1.0)])
    student = evaluation(finetune_accuracy__sst2=90.0)
    base = evaluation(finetune_accuracy__sst2=50.0, finetune_accuracy__gsm8k=10.0)
    result = gate.check(student, base)
    assert [(check.measure, check.passed) for check in result.checks] == [
        ("finetune_accuracy/sst2", True),
        ("finetune_accuracy/gsm8k", False),
    ]


def test_default_limits_report_every_number():
    student = evaluation(harmful_score=1.0, incoherent=0.0, over_refusal=2.0, finetune_accuracy__sst2=90.0)
    base = evaluation(harmful_score=100.0, incoherent=0.0, over_refusal=0.0, finetune_accuracy__sst2=50.0)
    report = Gate().check(student, base).as_dict()
    assert report["passed"] is True
    assert report["checks"][0] == {
        "measure": "harmful_score",
        "bound": "at_most",
        "limit": 5.0,
        "student": 1.0,
        "base": 100.0,
        "passed": True,
    }


def test_a_gate_without_limits_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        Gate([])
