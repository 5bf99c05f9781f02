"""Write README.md from nbs/index.ipynb, and its picture from the tour. From the project's folder: python tests/write_readme.py"""
import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "nbs" / "images" / "tour.jpg"


def readme_text():
    """The index notebook as one text; links to its pictures start at the project's folder."""
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    return "\n\n".join(cell.source for cell in cells).replace("](images/", "](nbs/images/") + "\n"


def tour_picture():
    """The first picture among the committed outputs of the tour, as JPEG."""
    cells = nbformat.read(ROOT / "nbs" / "00_tour.ipynb", as_version=4).cells
    found = [o.data["image/jpeg"] for c in cells for o in c.get("outputs", []) if "image/jpeg" in o.get("data", {})]
    return base64.b64decode(found[0])


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    PICTURE.write_bytes(tour_picture())
