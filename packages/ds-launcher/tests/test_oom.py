from __future__ import annotations

import pytest

from ds_launcher import oom


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "path"),
    [
        ("0::/user/job\n", "/sys/fs/cgroup/user/job/memory.events"),
        ("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", "/sys/fs/cgroup/memory/job/memory.oom_control"),
        ("0::/not/mounted\n", "/sys/fs/cgroup/memory.events"),
    ],
)
def test_both_versions_of_cgroups(tmp_path, cgroup, path):
    write(tmp_path, "proc/self/cgroup", cgroup)
    write(tmp_path, path[1:], "low 0\noom 4\noom_kill 3\n")
    write(tmp_path, "proc/vmstat", "nr_free_pages 7\noom_kill 12\n")
    assert oom.read_counters(tmp_path) == {path: 3, "/proc/vmstat": 12}


def test_nothing_to_read(tmp_path):
    assert oom.read_counters(tmp_path) == {}
    assert oom.explain({}, {}) == "whether memory ran out cannot be read on this system"


def test_explanations():
    group = "/sys/fs/cgroup/job/memory.events"
    before = {group: 1, oom.HOST: 5}
    assert oom.explain(before, before) == "the kernel reported no out-of-memory kill"
    assert oom.explain(before, {group: 3, oom.HOST: 7}) == (
        f"out of memory: the job's cgroup reported 2 out-of-memory kills meanwhile ({group})"
    )
    assert oom.explain(before, {group: 1, oom.HOST: 6}) == (
        "probably out of memory: the kernel reported 1 out-of-memory kill on this host meanwhile (/proc/vmstat)"
    )
