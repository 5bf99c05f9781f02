"""Write README.md from nbs/index.ipynb, and its picture from the tour: python tests/write_readme.py"""
import base64
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "nbs" / "images" / "tour.jpg"


def readme_text():
    """The index notebook as one text; its links start at the project's folder instead of nbs/."""
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells) + "\n"
    return re.sub(r"\]\((?!https?:)", "](nbs/", text).replace("](nbs/../", "](")


def tour_picture():
    """The first picture among the committed outputs of the tour, as JPEG."""
    cells = nbformat.read(ROOT / "nbs" / "00_tour.ipynb", as_version=4).cells
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return base64.b64decode(next(data["image/jpeg"] for data in shown if "image/jpeg" in data))


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    PICTURE.write_bytes(tour_picture())
