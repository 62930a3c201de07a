import contextlib

import pytest

from .workbench import cheap_training


@pytest.fixture(scope="module", autouse=True)
def cheap_runs(request):
    """In the files that train, a run takes a third of the time; see `cheap_training`."""
    trains = any(word in request.path.read_text("utf-8") for word in ("workbench", "kill_events", "cheap_runs"))
    with cheap_training() if trains else contextlib.nullcontext():
        yield
