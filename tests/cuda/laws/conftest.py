"""Each law of faults runs in a fork of its own: a poisoned context is for life, and so is a driver
that was told to fail."""

from __future__ import annotations

import json
import os

import pytest
from _pytest.runner import runtestprotocol


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if item.path.name != "fault_laws.py":
        return None
    hook = item.config.hook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        reports = runtestprotocol(item, log=False)
        told = [hook.pytest_report_to_serializable(config=item.config, report=r) for r in reports]
        with os.fdopen(write, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"{item.nodeid} ended its process: {status}"
    for each in json.loads(text):
        report = hook.pytest_report_from_serializable(config=item.config, data=each)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
