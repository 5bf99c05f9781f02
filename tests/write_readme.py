"""Write README.md from nbs/index.ipynb. Start it from the project's folder: python tests/write_readme.py"""
from pathlib import Path

import nbformat

index = nbformat.read(Path("nbs") / "index.ipynb", as_version=4)
Path("README.md").write_text("\n\n".join(cell.source for cell in index.cells) + "\n", encoding="utf-8")
