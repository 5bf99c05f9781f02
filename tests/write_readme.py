"""Write README.md from nbs/index.ipynb, and the README's picture from the last figure of chapter 10. From the project's folder: python tests/write_readme.py"""
import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def readme_text():
    """The index notebook as one text; links to its pictures start at the project's folder."""
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    return "\n\n".join(cell.source for cell in cells).replace("](images/", "](nbs/images/") + "\n"


def last_picture(name):
    """The last PNG among the committed outputs of a chapter."""
    cells = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells
    return [o.data["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})][-1]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    (ROOT / "nbs" / "images").mkdir(exist_ok=True)
    (ROOT / "nbs" / "images" / "gallery.png").write_bytes(base64.b64decode(last_picture("10_evaluate")))
