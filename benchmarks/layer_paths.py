"""Writes docs/layers.md: the path of each layer of Keras and each backbone of keras_hub.

    python benchmarks/layer_paths.py

Small models are built, and `clipping.explain` is asked. `tests/clipping/test_every_layer.py`
compares the same models with one example at a time.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layers.md"
HEAD = """\
# Which path each layer takes

Written by `benchmarks/layer_paths.py` with Keras {keras} and keras_hub {keras_hub}; not by hand.
`tests/clipping/test_every_layer.py` compares these models, in small sizes, with one example at a
time: norms and clipped sums agree to 1e-5. For a model of your own ask `clipping.explain(model)`.

* **book-keeping**: one forward and one backward pass for the whole batch. The last column has the
  rules of the layers. A layer "by example" alone is run again for each example; the rest of the
  model is not.
* **whole model by example**: each example passes the whole model alone. That is exact and slow. The
  last column names the classes that are not known to treat the rows of a batch independently. If
  you know that they do, say so with `clipping.declare_row_wise`.
* **refused**: no private step is possible, and the last column says why. What mixes the examples of
  a batch was found by `clipping.check_model`, which `fit` calls.

Some backbones are refused for what keras_hub does:

* CLIP, MetaCLIP 2 and SigLIP compare each image of a batch with each text. Their vision and text
  encoders can be trained by themselves.
* XLNet reshapes the padding mask where a transposition is meant, so that rows whose lengths differ
  get each other's masks.
* Stable Diffusion 3 takes the number of steps and the guidance scale from the first row.
* SAM 3 gives attention a mask of two axes, which is read along the queries in place of the rows.
"""


def table(title: str, lines: Iterable[tuple[str, str, str]]) -> str:
    """Returns a section with a table."""
    rows = [f"| {name} | {path} | {why} |" for name, path, why in lines]
    return "\n".join(
        [f"## {title}", "", "| Layer | Path | Rules, or why |", "|---|---|---|", *rows]
    )


def page() -> str:
    """Returns the text of docs/layers.md."""
    import keras
    import keras_hub

    from tests.clipping import every_layer

    head = HEAD.format(keras=keras.__version__, keras_hub=keras_hub.__version__)
    parts = [
        head,
        table("Layers of Keras", every_layer.keras_paths()) + "\n",
        table("Backbones of keras_hub", every_layer.backbone_paths()) + "\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
