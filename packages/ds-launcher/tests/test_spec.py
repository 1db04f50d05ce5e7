from __future__ import annotations

import json

from ds_launcher.spec import AgentReport, AgentSpec, RankFailure, encode


def test_a_job_survives_the_journey():
    # Arguments that are not UTF-8 are lone surrogates in Python.
    spec = AgentSpec(["p", "\udcff", "é", "a\nb"], "id", nproc=1, world_size=1, env={"K": "\udcfe"})
    line = encode(spec)
    assert line.count(b"\n") == 1
    assert AgentSpec(**json.loads(line)) == spec


def test_a_report_survives_the_journey():
    failure = RankFailure(1, "h", 2, -9, ["caf\\xe9"], is_traceback=False, out_of_memory="no")
    report = AgentReport(failure=failure, survivors=[3])
    assert AgentReport.decode(encode(report)) == report
    assert AgentReport.decode(encode(AgentReport())) == AgentReport()
