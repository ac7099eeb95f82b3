"""docs/tutorial.ipynb from its first cell to its last, on the tiny models of the other tests."""

from pathlib import Path

import nbformat
from helpers import ROOT
from nbclient import NotebookClient

PAGE = ROOT / "docs" / "tutorial.ipynb"
MOST_STORED = 8_000  # characters of an output that the repository keeps


def outputs(cells, kind: str) -> list[str]:
    return [out["data"][kind] for cell in cells for out in cell.get("outputs", []) if kind in out.get("data", {})]


def test_the_tutorial_runs(caps, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(Path(caps["caps"]).parent)
    monkeypatch.setenv("TUTORIAL_FOLDER", str(tmp_path))
    notebook = nbformat.read(PAGE, as_version=4)
    cells = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "docs")}}).execute().cells
    printed = "".join(out["text"] for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "stream")
    assert "next: python train.py --dataset data/tutorial" in printed and "base, steered" in printed
    table, page, codes = outputs(cells, "text/html")
    assert "change_score" in table and page.count("<p>") == 3 and "rgba(255, 140, 0, 1.00)" in page
    assert "True" in table  # a latent that is called changed
    assert (tmp_path / "runs" / "tutorial" / "analysis" / "report.html").is_file()


def test_what_is_stored_of_the_tutorial_is_small_and_without_errors():
    cells = nbformat.read(PAGE, as_version=4).cells
    stored = [out for cell in cells for out in cell.get("outputs", [])]
    assert len(stored) >= 5 and all(out["output_type"] != "error" and len(str(out)) < MOST_STORED for out in stored)
