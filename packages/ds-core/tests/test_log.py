"""One logger: silent at import, audible where the application has not decided, rank 0's voice."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from ds_core import log
from ds_core.errors import ConfigError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    log.reset()
    yield
    log.reset()


def run(code: str, **env: str) -> str:
    """Return what a process that runs ``code`` writes to stderr; pytest has handlers of its own in this one."""
    done = subprocess.run(
        [sys.executable, "-c", f"from ds_core import log\nimport logging\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), **env},
    )
    assert done.stdout == ""
    return done.stderr


def test_configured_it_speaks_once_through_its_own_handler():
    code = "for _ in range(3): log.configure(None)\nlog.logger.info('hello'); log.logger.debug('not this')"
    [line] = run(code).splitlines()
    assert line.endswith("[INFO] [ds] hello")


def test_unconfigured_it_is_silent_below_warning():
    assert run("log.logger.info('hello')") == ""


def test_an_application_that_has_handlers_keeps_its_way():
    code = "logging.basicConfig(format='mine %(message)s', level='INFO')\nlog.configure(None); log.logger.info('hello')"
    assert run(code) == "mine hello\n"


def test_a_level_is_used_also_where_the_application_has_handlers():
    code = (
        "logging.basicConfig(format='mine %(message)s', level='INFO')\nlog.configure('Error')\nlog.logger.info('hello')"
    )
    assert run(code) == ""
    assert run("log.configure('debug'); log.logger.debug('hello')").endswith("hello\n")


def test_an_unknown_level_lists_the_known_ones():
    with pytest.raises(ConfigError, match="log_level is 'loud'") as caught:
        log.configure("loud")
    assert "warning" in caught.value.fix


def test_resetting_undoes_it():
    before = (list(log.logger.handlers), log.logger.level, log.logger.propagate)
    log.configure("debug")
    log.reset()
    assert (log.logger.handlers, log.logger.level, log.logger.propagate) == before == ([], logging.NOTSET, True)


@pytest.mark.parametrize(
    ("rank", "ranks", "expected"),
    [
        ("0", None, ["text"]),
        ("1", None, []),
        ("1", [1, 2], ["[Rank 1] text"]),
        ("0", [1, 2], []),
        ("3", [-1], ["[Rank 3] text"]),
        ("0", [], []),
    ],
)
def test_messages_are_for_the_ranks_named(rank, ranks, expected, monkeypatch, caplog):
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "ds_core"):
        log.log_dist("text", ranks)
    assert caplog.messages == expected


def test_without_a_launcher_this_is_rank_0(caplog):
    with caplog.at_level(logging.INFO, "ds_core"):
        log.log_dist("text", level=logging.WARNING)
    assert caplog.records[0].levelno == logging.WARNING
