"""Drawings of the things: fetched with npm, rendered from SVG, saved as one array.

    python -m tools.demo_model.drawings --cache .demo-data

Fluent Emoji (flat) by Microsoft, MIT, and emojibase's labels by Miles Johnson, MIT; see NOTICE.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from .vocabulary import THINGS

DRAWINGS_PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
LABELS_PACKAGE = "emojibase-data@17.0.0"
SIDE = 128


def fetch(package: str, cache: Path) -> Path:
    """Download an npm package into the cache, once; return the folder with its files."""
    folder = cache / re.sub(r"[^\w.]+", "-", package).strip("-")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        )
        archive = cache / done.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
    return folder / "package"


def icon_name(label: str) -> str:
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def svg_of(icons: dict[str, Any], name: str) -> str:
    """SVG document of an icon, or of an icon's alias, in an iconify collection."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def render(cache: Path) -> np.ndarray:
    """Render all things as RGBA without premultiplied alpha, uint8 [things, SIDE, SIDE, 4]."""
    import resvg_py
    from PIL import Image

    icons = json.loads((fetch(DRAWINGS_PACKAGE, cache) / "icons.json").read_text())
    data = json.loads((fetch(LABELS_PACKAGE, cache) / "en" / "data.json").read_text())
    labels = {entry["label"].lower(): entry["label"] for entry in data}
    pictures = []
    for thing in THINGS:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg_of(icons, icon_name(labels[thing])), width=SIDE, height=SIDE))
        pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE))))
    return np.stack(pictures)


def load(path: Path) -> np.ndarray:
    with np.load(path) as file:
        if tuple(file["things"]) != THINGS:
            raise SystemExit(f"{path} holds other things than vocabulary.py names: render it again")
        rgba: np.ndarray = file["rgba"]
        return rgba


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".demo-data"))
    cache = parser.parse_args().cache
    rgba = render(cache / "npm")
    np.savez_compressed(cache / "drawings.npz", rgba=rgba, things=np.array(THINGS))
    print(f"{len(rgba)} drawings in {cache / 'drawings.npz'}")


if __name__ == "__main__":
    main()
