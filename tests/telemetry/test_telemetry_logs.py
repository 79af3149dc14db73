"""Logs are JSON, contain the request and the job, and no row text."""

import io
import json
import logging
from contextvars import copy_context
from threading import Thread

import pytest

from reft_ray.telemetry.logs import MESSAGE_LIMIT, configure, log_context

ROW = "how do I steal a car"


@pytest.fixture
def lines():
    stream = io.StringIO()
    logger = logging.getLogger("reft_ray")
    before = logger.propagate, logger.level
    handler = configure("INFO", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.propagate, logger.level = before


def test_a_record_is_one_json_object(lines):
    logging.getLogger("reft_ray.serving").info("batch of %d rows\nscored", 3, extra={"rows": 3, "seconds": 0.5})
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "reft_ray.serving",
        "message": "batch of 3 rows\nscored",
        "rows": 3,
        "seconds": 0.5,
    }


def test_context_fields_are_logged_inside_the_block_and_in_threads(lines):
    logger = logging.getLogger("reft_ray.api")
    with log_context(request_id="req-1"):
        with log_context(job_id="ftjob-1"):
            context = copy_context()
            thread = Thread(target=lambda: context.run(logger.info, "in a thread"))
            thread.start()
            thread.join()
        logger.info("outside the job")
    logger.info("outside")
    assert [(line.get("request_id"), line.get("job_id")) for line in lines()] == [
        ("req-1", "ftjob-1"),
        ("req-1", None),
        (None, None),
    ]


def test_row_text_in_exceptions_and_unknown_fields_is_not_logged(lines):
    logger = logging.getLogger("reft_ray.screening")
    try:
        raise ValueError(f"cannot read row {ROW}")
    except ValueError:
        logger.exception("a row could not be read", extra={"text": ROW})
    (line,) = lines()
    assert line["exception"] == "ValueError"
    assert "test_row_text_in_exceptions" in line["where"][-1]
    assert ROW not in json.dumps(line)


def test_long_messages_are_truncated(lines):
    logging.getLogger("reft_ray").info("x" * 10_000)
    assert len(lines()[0]["message"]) == MESSAGE_LIMIT + 3


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown log fields"), log_context(prompt=ROW):
        pass


def test_configuring_twice_writes_once(lines):
    stream = io.StringIO()
    handler = configure("INFO", stream)
    logging.getLogger("reft_ray").info("once")
    logging.getLogger("reft_ray").removeHandler(handler)
    assert len(stream.getvalue().splitlines()) == 1
    assert lines() == []
