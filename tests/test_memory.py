"""What the system leaves to a process: its cgroup and those above it."""

from pathlib import Path

import pytest

from rsprune.memory import cgroup_limits, memory_limit

CASES: dict[str, tuple[str, dict[str, str], list[int]]] = {
    "version 2, own group": ("0::/a/b\n", {"a/b/memory.max": "100"}, [100]),
    "version 2, a group above": (
        "0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "70"}, [70],
    ),
    "version 2, a container": ("0::/docker/1f\n", {"memory.max": "50"}, [50]),
    "version 1": (
        "9:name=systemd:/\n4:cpu,memory:/x\n",
        {"memory/x/memory.limit_in_bytes": "30", "memory/memory.limit_in_bytes": "40"},
        [30, 40],
    ),
    "another controller": ("3:cpuset:/x\n", {"cpuset/x/memory.limit_in_bytes": "1"}, []),
    "none": ("", {}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_limits_of_cgroups(case: str, tmp_path: Path) -> None:
    groups, files, expected = CASES[case]
    proc = tmp_path / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cgroup_limits(tmp_path) == expected


def test_a_system_without_cgroups_has_none(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsprune.memory.cgroup_limits", lambda: [1 << 50])
    free = memory_limit()
    assert 0 < free < 1 << 50
    monkeypatch.setattr("rsprune.memory.cgroup_limits", lambda: [1 << 50, 1000])
    assert memory_limit() == 900
