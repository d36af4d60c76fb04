"""Threads that the process may keep busy: affinity and quotas of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitsmoe_plugin.base import threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        # Of the groups above it the tightest counts, and of a name that is the host's, what is mounted.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}, 1.0),
        ("0::/host/name\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "4:cpu,cpuacct:/a\n3:memory:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            1.5,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {}, None),
    ],
)
def test_quotas_of_both_versions_are_read(
    own: str, files: dict[str, str], wanted: float | None, tmp_path: Path
) -> None:
    """Guards containers that may use less than the cores they see."""
    write(tmp_path / "own", own)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert threads.quota(tmp_path / "cgroup", tmp_path / "own") == wanted


def test_no_more_threads_than_can_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota of 0.5 cores still leaves one thread; afterwards there are as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(threads, "affinity", lambda: 2)
        monkeypatch.setattr(threads, "quota", lambda: 0.5)
        told = pytest.warns(UserWarning, match="3 threads, but this process may use 1")
        with told, threads.within_limits():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(threads, "affinity", lambda: 4)
        monkeypatch.setattr(threads, "quota", lambda: None)
        with threads.within_limits():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
