"""The shape of the project: README, imports, notebooks, packaging."""
import ast
import configparser
import re
import subprocess
import sys
import zipfile

import nbformat
import papermill
import pytest

from conftest import ROOT
from rsground_nb.run import COURSE, ORDER
from write_readme import PICTURE, readme_text, tour_picture

TOUR = "00_tour"  # the one notebook without a module
NOTEBOOKS = [ROOT / "nbs" / f"{name}.ipynb" for name in (TOUR, *ORDER)]
MODULES = [name.split("/")[-1].split("_")[-1] for name in ORDER]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def cells(path): return nbformat.read(path, as_version=4).cells


def test_readme_is_the_index_notebook():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == readme_text(), "write README.md anew: python tests/write_readme.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_code_block_of_a_page_is_closed(page):
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
    assert fences or page.parent.name == "docs"
    assert all(re.fullmatch(r"```\w+", line) for line in fences[::2])
    assert all(line == "```" for line in fences[1::2]) and len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_and_pictures_of_a_page_exist(page):
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert targets or page.parent.name == "docs"
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_the_picture_of_the_readme_is_the_tours():
    assert f"({PICTURE.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert PICTURE.read_bytes() == tour_picture(), "python tests/write_readme.py"


def test_the_readme_is_short():
    words = (ROOT / "README.md").read_text(encoding="utf-8").replace("|", " ").split()
    assert len(words) <= 900


def test_readme_has_the_two_commands_that_ci_runs():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for last in ("pytest", "rsground run"):
        for start in ("python3 -m venv", "py -m venv"):
            found = [line for line in readme.splitlines() if line.startswith(start) and line.endswith(last)]
            assert len(found) == 1 and "constraints.txt" in found[0], (start, last)
    assert "README.md" in ci and "pip install" not in ci, "CI must read the commands from the README"


def test_readme_and_reference_page_list_every_notebook_shelf_by_shelf():
    readme = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reference.md"))
    rows = re.findall(r"^\| ([\w/]+) \|(?: `(\w+)`)? \| .+\? \|$", readme, re.M)
    shelves = ["", "deeper", "reference"]
    wanted = [(TOUR, ""), *zip(ORDER, MODULES)]
    assert sorted(rows) == sorted(wanted)
    places = [shelves.index(name.rpartition("/")[0]) for name, _ in rows]
    assert places == sorted(places)


def test_the_minutes_of_the_course_name_its_chapters():
    rows = (ROOT / "tests" / "course_minutes.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["chapter", *COURSE]


def test_the_course_is_the_first_shelf_and_begins_with_the_tour():
    assert COURSE == [TOUR, *(name for name in ORDER if "/" not in name)]
    found = {p.stem for p in (ROOT / "nbs").glob("*.ipynb")} - {"index"}
    assert found == set(COURSE) and sorted(COURSE) == COURSE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_its_header_and_parameters(path):
    found = cells(path)
    assert re.match(r"# .+\n> .+", found[0].source)
    module = [c.source.strip() for c in found if c.source.startswith("#| default_exp")]
    if path.stem == TOUR: assert module == [] and not any(re.match(r"#\|\s*export", c.source) for c in found)
    else: assert [found[1].source.strip()] == module == [f"#| default_exp {path.stem.split('_')[-1]}"]
    tagged = [c for c in found if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and "export" not in tagged[0].source
    assert re.findall(r"^(\w+): ", tagged[0].source, re.M) == ["scale", "seed", "out", "data"]
    assert all("id" in c for c in found)


def imported(module):
    """Modules of this package that a module's source imports anywhere, also inside functions."""
    tree = ast.parse((ROOT / "rsground_nb" / f"{module}.py").read_text(encoding="utf-8"))
    found = [(n.level, n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    ours = [name for level, name in found if level or name.startswith("rsground_nb")]
    return {name.removeprefix("rsground_nb.") for name in ours}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_chapters_above_it(module):
    assert imported(module) <= set(MODULES[:MODULES.index(module)])


def test_importing_modules_has_no_side_effects(tmp_path):
    """In one process, in the order of ORDER. Libraries come first: their imports are not ours."""
    program = f"""
import importlib, os, random, sys
from trl import GRPOTrainer, SFTTrainer
before, state = dict(os.environ), random.getstate()
for k, module in enumerate({MODULES}):
    importlib.import_module('rsground_nb.' + module)
    loaded = {{m.split('.')[1] for m in sys.modules if m.startswith('rsground_nb.') and m.count('.') == 1}}
    assert loaded <= set({MODULES}[:k + 1]), (module, loaded)
    assert dict(os.environ) == before, module + ' changes the environment'
    assert random.getstate() == state, module + ' changes the random state'
    assert not {{'nbdev', 'fastcore'}} & set(sys.modules), module + ' needs nbdev at run time'"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_importing_the_package_is_light():
    program = """
import sys, rsground_nb
print({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'datasets', 'numpy'})"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_runtime_requirements_hold_no_nbdev():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    assert not re.search(r"nbdev|fastcore|execnb", settings["DEFAULT"]["requirements"])


def test_nothing_committed_names_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked: pytest.skip("not a git checkout")
    for name in tracked:
        if not name.endswith((".safetensors", ".png", ".jpg")):
            packed = zipfile.ZipFile(ROOT / name) if name.endswith(".zip") else None
            text = ("".join(packed.read(member).decode() for member in packed.namelist()) if packed
                    else (ROOT / name).read_text(encoding="utf-8"))
            assert not re.search(r"/(?:root|home|work|tmp)/\w", text), name


def test_running_an_edited_notebook_leaves_the_package_as_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("IN_TEST")
    notebook = nbformat.read(ROOT / "nbs" / "reference" / "exercises.ipynb", as_version=4)
    edited = next(c for c in notebook.cells if c.source.startswith("#| export\n@dataclass"))
    edited.source = edited.source.replace("#| export", "#| export\nEDITED = True", 1)
    nbformat.write(notebook, tmp_path / "exercises.ipynb")
    files = sorted((ROOT / "rsground_nb").glob("*.py"))
    before = [p.read_bytes() for p in files]
    folder = str(ROOT / "nbs" / "reference")
    papermill.execute_notebook(tmp_path / "exercises.ipynb", tmp_path / "done.ipynb", cwd=folder,
                               progress_bar=False)
    assert [p.read_bytes() for p in files] == before
    assert "EDITED" in (tmp_path / "done.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_no_notebook_exports(path):
    assert not [c.source for c in cells(path) if c.cell_type == "code" and "nbdev_export(" in c.source]


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_no_list_runs_on_in_a_line_and_no_score_is_an_address(path):
    lines = [line for c in cells(path) if c.cell_type == "markdown" for line in c.source.splitlines()]
    run_on = re.compile(r"[.:;?)] +(- |[2-9]\. )[*`A-Z]")
    assert not [line for line in lines if run_on.search(line) and line[0] != "|"]
    # JupyterLab makes an e-mail address of Acc@0.5, unless it stands in backticks
    assert not [line for line in lines if "@0." in re.sub("`[^`]*`", "", line)]


@pytest.mark.parametrize("name", COURSE)
def test_a_chapter_is_short(name):
    found = cells(ROOT / "nbs" / f"{name}.ipynb")
    words = sum(len(c.source.split()) for c in found if c.cell_type == "markdown")
    assert len(found) <= 40 and words <= 1200
