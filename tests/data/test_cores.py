import contextlib
import os
import subprocess
import sys

import pytest

from effnet_hf.data import cores


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "nonsense"}, None),
        # A batch system's limit lies on the job's group, or on one above it.
        ({"cpu.max": "max 100000\n", "job/cpu.max": "300000 100000\n", "job/step/cpu.max": "max 100000\n"}, 3.0),
        ({"cpu/job/step/cpu.cfs_quota_us": "250000\n", "cpu/job/step/cpu.cfs_period_us": "100000\n"}, 2.5),
    ],
)
def test_container_quotas_count(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job/step\n3:memory:/\n0::/job/step\n")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cores.usable_cores(tmp_path, tmp_path / "membership") == (64 if expected is None else expected)


@pytest.mark.parametrize(
    "device, own, expected",
    [("cuda", 16, 15), ("cuda", 12.8, 11), ("cuda", 256, 32), ("cuda", 1, 0), ("cpu", 16, 1), ("cpu", 1.5, 0)],
)
def test_workers_leave_a_core_to_the_trainer(device, own, expected):
    assert cores.choose_workers(device, own) == expected


def spans(*bounds):
    return [set(range(*span)) for span in bounds]


@pytest.mark.parametrize(
    "masks, quota, expected",
    [
        # DGX H100: 224 CPUs, each half beside four GPUs. DGX A100: 256 CPUs in eight nodes, two GPUs beside a node.
        pytest.param(spans(*[(0, 112)] * 4, *[(112, 224)] * 4), None, 28, id="four GPUs a socket"),
        pytest.param(spans(*[(32 * (i // 2), 32 * (i // 2) + 32) for i in range(8)]), None, 16, id="two GPUs a node"),
        pytest.param(spans(*[(32 * i, 32 * i + 32) for i in range(8)]), None, 32, id="one GPU a node"),
        pytest.param(spans(*[(0, 224)] * 8), None, 28, id="no affinity"),
        pytest.param(spans(*[(0, 16)] * 8), None, 2, id="taskset on the launcher"),
        pytest.param(spans((0, 8), (4, 12)), None, 6, id="overlapping masks"),
        pytest.param(spans(*[(0, 112)] * 4, *[(112, 224)] * 4), 64, 8, id="a container's quota"),
        pytest.param(spans((0, 224)), 64, 64, id="one process"),
    ],
)
def test_cores_are_divided_by_those_that_share_them(tmp_path, monkeypatch, masks, quota, expected):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota * 100000} 100000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(masks)))
    monkeypatch.setattr(cores, "_own_mask", lambda: masks[0])
    monkeypatch.setattr(cores, "_masks_of_all", lambda: masks)
    assert cores.own_cores(tmp_path, tmp_path / "none") == pytest.approx(expected)


@pytest.mark.parametrize("seen", [0, 7])
def test_processes_that_cannot_be_found_are_taken_to_share_every_core(tmp_path, monkeypatch, seen):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(cores, "_own_mask", lambda: set(range(16)))
    monkeypatch.setattr(cores, "_masks_of_all", lambda: [{i} for i in range(seen)])
    assert cores.own_cores(tmp_path, tmp_path / "none") == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks are Linux's")
def test_masks_are_read_from_the_launchers_children(tmp_path):
    """Real processes: two ranks and a bystander without a rank, of which only the ranks count."""
    mask = sorted(os.sched_getaffinity(0))
    own, other = {mask[0]}, {mask[-1]}
    ranks = {**os.environ, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    program = "import importlib.util as u, sys; s = u.spec_from_file_location('w', sys.argv[1]);"
    program += " w = u.module_from_spec(s); s.loader.exec_module(w); input(); print(w.own_cores('/none', '/none'))"
    waiting = [sys.executable, "-c", "input()"]
    without = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(argv, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for argv, env in (
                ([sys.executable, "-c", program, cores.__file__], ranks),
                (waiting, {**ranks, "LOCAL_RANK": "1"}),
                (waiting, without),
            )
        ]
        for process, mask in zip(started, (own, other, own)):
            os.sched_setaffinity(process.pid, mask)
        share, _ = started[0].communicate("go\n", timeout=60)
        for process in started[1:]:
            process.communicate("go\n", timeout=60)
    assert float(share) == (1 if own != other else 0.5)


def test_the_launcher_says_how_many_processes_share_the_machine(monkeypatch):
    monkeypatch.setattr(cores, "_own_mask", lambda: set(range(16)))
    monkeypatch.setattr(cores, "_quota", lambda root, membership: float("inf"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores.choose_workers("cuda") == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores.choose_workers("cuda") == 15
