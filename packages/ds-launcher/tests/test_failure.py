from __future__ import annotations

import pytest

from ds_launcher.failure import describe, describe_status
from ds_launcher.spec import RankFailure


def test_everything_known_is_said():
    failure = RankFailure(
        3, "node7", 99, -9, ["", "  last"], is_traceback=False, out_of_memory="out of memory: ...", log="d/rank_3.log"
    )
    assert describe(failure).split("\n") == [
        "ds run: rank 3 on host node7 failed first: killed by SIGKILL",
        "  memory: out of memory: ...",
        "  log: d/rank_3.log",
        "  last lines of its stderr (2):",
        "",
        "      last",
    ]


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (3, "exit code 3", 3),
        (-11, "killed by SIGSEGV", 139),
        (-9, "killed by SIGKILL", 137),
        (-40, "killed by signal 40", 168),
    ],
)
def test_status(status, text, code):
    assert describe_status(status) == text
    assert RankFailure(0, "h", 1, status, [], is_traceback=False).exit_code == code
