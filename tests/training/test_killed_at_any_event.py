"""A sample of tests/training/kill_and_resume.py --events, which kills at every one."""

import pytest

from .kill_events import scenarios


# Of some scenarios these shares of the way through their events; the whole takes an hour.
SAMPLE = {
    "train --resume auto": (0.95,), "train --resume OLDER": (0.1,), "train --overwrite": (0.05,),
    "convert --overwrite": (0.2, 0.8),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_killed_leaves_what_was_there_or_what_was_asked_for(name, tmp_path):
    (scenario,) = scenarios(tmp_path / "start", [name])
    found = scenario.run(tmp_path / "work", shares=SAMPLE[name])
    assert found.events > 20 and found.kills == len(SAMPLE[name])
    assert not found.wrong
