"""Notebooks run from top to bottom with a fast setting, and are committed as they ran in full."""
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlm

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@each_notebook
def test_runs_from_top_to_bottom(path, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(map(source, code_cells(path))), encoding="utf-8")
    fast = {"DLM_FAST": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=path.parent,
                          env={**os.environ, **fast}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_notebook
def test_is_committed_as_it_ran(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    assert "/tmp" not in path.read_text(encoding="utf-8")


@each_notebook
def test_shows_the_functions_as_they_stand(path):
    for cell in code_cells(path):
        if "getsource" in source(cell):
            names = re.findall(r"^(?:def|class) (\w+)", printed(cell), re.MULTILINE)
            assert names
            for name in names:
                assert inspect.getsource(getattr(dlm, name)).rstrip() in printed(cell), name


# --------------------------------------------------------------------------------------------------
# Pictures and tables of the pages

@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    import draw
    yield draw
    draw.plt.close("all")


def text_of_pages(draw):
    return "\n".join(page.read_text(encoding="utf-8") for page in draw.PAGES)


def test_each_picture_of_the_pages_is_drawn_from_what_is_kept(draw):
    shown = re.findall(r"!\[[^]]*\]\((?:assets/)?(\w+)\.png\)", text_of_pages(draw))
    kept = {path.stem for path in (ROOT / "assets").glob("*.png")}
    assert set(shown) == set(draw.PICTURES) == kept
    axes = [ax for paint in draw.PICTURES.values() for ax in paint().axes]
    for ax in axes:
        assert ax.get_xlabel() or ax.get_title()
        assert ax.get_ylabel()
        assert ax.lines or ax.patches
    for line in (line for ax in axes for line in ax.lines):
        assert len(line.get_xdata())
        assert all(abs(float(y)) < 1e9 for y in line.get_ydata())  # no gaps, no NaN


def test_each_table_of_the_pages_says_what_is_kept(draw):
    text = text_of_pages(draw)
    assert sorted(re.findall(r"<!-- table (\S+) -->\n\|", text)) == sorted(draw.TABLES)
    assert draw.with_tables(text) == text
    assert "nan" not in "".join(table() for table in draw.TABLES.values())


def test_the_curve_of_noise_levels_is_found(draw):
    gamma = torch.linspace(-2, 8, 30)
    nats = 2.5 * (-(-(gamma - 2.2) / 0.7).exp()).exp()
    mu, beta = draw.fit_levels(gamma, nats, 2.5)
    torch.testing.assert_close(torch.stack([mu, beta]), torch.tensor([2.2, 0.7]), atol=0.01, rtol=0)
