"""Shared by all tests: where the shared data are, and one smoke run that several tests look at."""
import os
import sys
from pathlib import Path

os.environ["IN_TEST"] = "1"  # a notebook's last cell must not export while tests run
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

# a busy machine is no failure; a commit has one outcome
settings.register_profile("same", deadline=None, derandomize=True)
# pytest --hypothesis-profile search: look for more
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("same")
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("RSGROUND_SHARED", ROOT.parent / "shared")).resolve()


def lines_run(work):
    """How many lines of Python (counted with calls and returns) `work()` executes."""
    count = 0
    def tick(frame, event, arg):
        nonlocal count
        count += 1
        return tick
    before = sys.gettrace()
    sys.settrace(tick)
    try: work()
    finally: sys.settrace(before)
    return count


def said_by_checks(notebook, tag="check"):
    """What the cells with a tag of an executed notebook answered, one text each."""
    return ["".join(o["data"]["text/plain"] for o in c.outputs if "data" in o)
            for c in notebook.cells if tag in c.metadata.get("tags", [])]


def pytest_collection_modifyitems(items):
    """Two processes share the test files. The one with the smoke run takes longest and begins."""
    items.sort(key=lambda item: item.path.stem != "test_run")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is read from files is cached in a temporary folder, not in the home of whoever runs the tests."""
    os.environ["RSGROUND_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared():
    """The folder with shared test data. Absent on a fork's machine: skip. Absent although
    RSGROUND_SHARED names it: fail."""
    if (SHARED / "data").is_dir(): return SHARED / "data"
    assert "RSGROUND_SHARED" not in os.environ, f"RSGROUND_SHARED is set, but {SHARED}/data does not exist"
    pytest.skip("shared test data are not on this machine (set RSGROUND_SHARED or put them in ../shared)")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """A finished `rsground run` at smoke scale on drawn scenes, made once for all tests."""
    from rsground_nb.run import COURSE, ORDER, main, run_chapter

    out = tmp_path_factory.mktemp("smoke") / "run"
    assert main(["run", "--out", str(out)]) == 0
    for name in ORDER:
        if name not in COURSE:
            run_chapter(name, out / "notebooks" / f"{name}.ipynb", scale="smoke", seed=0, out=str(out),
                        data="scenes")
    return out
