"""Notebooks run from top to bottom with a fast setting, and are committed as they ran in full."""
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlm

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(c["source"]) for c in code_cells(path)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=path.parent, capture_output=True, text=True,
                          env={**os.environ, "DLM_FAST": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(path.parent.parent)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_committed_as_it_ran(path):
    cells = code_cells(path)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    assert "/tmp" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_shows_the_functions_as_they_stand(path):
    for c in code_cells(path):
        if "getsource" in "".join(c["source"]):
            shown = "".join("".join(o.get("text", "")) for o in c["outputs"])
            names = re.findall(r"^(?:def|class) (\w+)", shown, re.MULTILINE)
            assert names and all(inspect.getsource(getattr(dlm, name)).rstrip() in shown for name in names), names


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    import draw
    yield draw
    draw.plt.close("all")


def test_each_picture_of_the_readme_is_drawn_from_what_is_kept(draw):
    shown = re.findall(r"!\[.*?\]\(assets/(\w+)\.png\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(draw.PICTURES) == sorted(p.stem for p in (ROOT / "assets").glob("*.png"))
    for paint in draw.PICTURES.values():
        for ax in paint().axes:
            assert ax.get_xlabel() or ax.get_title()
            assert ax.get_ylabel() and (ax.lines or ax.patches)
            for line in ax.lines:
                assert len(line.get_xdata()) and all(abs(float(y)) < 1e9 for y in line.get_ydata())   # no gaps, no NaN


def test_each_table_of_the_readme_says_what_is_kept(draw):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- table (\S+) -->\n\|", readme)) == sorted(draw.TABLES)
    assert draw.with_tables(readme) == readme
    assert "nan" not in "".join(table() for table in draw.TABLES.values())
