"""Visualisation of a trained image model: its predictions for held-out pictures and its feature maps
(`seqlab show WORKDIR`)."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from seqlab.studies.runs import RunError, load
from seqlab.studies.texts import is_published


class Views(NamedTuple):
    """Held-out pictures [n, h, w, c], their targets, the model's outputs (logits or pictures), and the output
    maps of its stages."""

    inputs: Float[np.ndarray, "n h w c"]
    targets: Num[np.ndarray, "n *t"]
    outputs: Float[np.ndarray, "n *o k"]
    maps: list[Float[np.ndarray, "n i j d"]]


def views(model: Any, experiment: Any, count: int) -> Views:
    """`count` of the experiment's held-out pictures, spread over all of them, through `model`.

    Raises:
      RunError: the model is not one of images.
    """
    pictures = experiment.data.validation()
    count = min(count, len(pictures))
    items = [pictures[i * len(pictures) // count] for i in range(count)]
    if not hasattr(model, "features") or items[0]["inputs"].ndim != 3:
        raise RunError("this run is of a model that does not look at images: there is nothing to draw")
    inputs, targets = (np.stack([item[name] for item in items]) for name in ("inputs", "targets"))
    outputs, maps = jax.device_get(jax.jit(lambda x: (model(x), model.features(x)))(jnp.asarray(inputs)))
    return Views(inputs, targets, np.asarray(outputs, np.float32), [np.asarray(y, np.float32) for y in maps])


def show(
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    count: int = 6,
    path: str | os.PathLike[str] | None = None,
    trust: bool = False,
) -> pathlib.Path:
    """Draw `count` held-out pictures with the model's answers and feature maps; returns where, `path` or
    WORKDIR/show.png.

    The first three principal components of a map [i, j, d], over all pictures drawn, are shown as red, green
    and blue. `trust` as in `runs.load`.

    Raises:
      RunError: as `runs.load`, or the model is not one of images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from seqlab.train import config

    run = load(workdir, step, trust=trust)
    if is_published(run):
        raise RunError(f"{workdir} is a published language model, which does not look at images")
    seen = views(run.model, config.build(run.config), count)
    columns = [("picture", list(map(_as_picture, seen.inputs))), *_answers(seen)]
    columns += [
        (f"stage {i}: {y.shape[1]} × {y.shape[2]} × {y.shape[3]}", list(_colours(y)))
        for i, y in enumerate(seen.maps, 1)
    ]
    rows = len(seen.inputs)
    figure = Figure(figsize=(1.6 * len(columns), 1.7 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, panels) in enumerate(columns):
        axes[0, j].set_title(title, fontsize=8)
        for i, panel in enumerate(panels):
            axes[i, j].imshow(panel, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            axes[i, j].set_axis_off()
    if seen.targets.ndim == 1:
        for axis, (said, right) in zip(axes[:, 0], captions(seen), strict=True):
            axis.text(
                0.5,
                -0.02,
                said,
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=7,
                color="green" if right else "red",
            )
    path = pathlib.Path(workdir) / "show.png" if path is None else pathlib.Path(path)
    figure.savefig(path, dpi=130)
    return path


def captions(seen: Views) -> list[tuple[str, bool]]:
    """For classification: the prediction per picture, its probability, and whether it is correct."""
    found = []
    for share, true in zip(
        np.asarray(jax.nn.softmax(seen.outputs, axis=-1)), seen.targets.tolist(), strict=True
    ):
        said = int(share.argmax())
        found.append(
            (f"{said} at {share[said]:.0%}" + ("" if said == true else f", is {true}"), said == true)
        )
    return found


def _answers(seen: Views) -> list[tuple[str, list[Array]]]:
    """Columns for dense outputs: classes in colours, or pictures."""
    if seen.targets.ndim == 1:
        return []
    if np.issubdtype(seen.targets.dtype, np.integer):
        from matplotlib import colormaps

        palette = np.concatenate([np.zeros((1, 3)), colormaps["tab20"](np.arange(20))[:, :3]])
        said, true = seen.outputs.argmax(axis=-1), seen.targets
        return [("said", list(palette[said % len(palette)])), ("true", list(palette[true % len(palette)]))]
    return [("said", list(map(_as_picture, seen.outputs))), ("true", list(map(_as_picture, seen.targets)))]


def _as_picture(x: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w *c"]:
    x = np.clip(x, 0, 1)
    return x if x.shape[2] == 3 else x.mean(axis=2)


def _colours(y: Float[np.ndarray, "n i j d"]) -> Float[np.ndarray, "n i j 3"]:
    """Every map as a picture: its three principal components, each scaled to [0, 1] between its 1st and 99th
    percentiles."""
    flat = y.reshape(-1, y.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].T
    parts = np.pad(parts, [(0, 0), (0, 3 - parts.shape[1])])
    low, high = np.percentile(parts, [1, 99], axis=0)
    return np.clip((parts - low) / np.where(high > low, high - low, 1), 0, 1).reshape(*y.shape[:3], 3)
