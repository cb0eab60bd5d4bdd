"""Positions of text and video tokens in time, height and width (Qwen2.5-VL's rule; StreamingVLM, arXiv
2510.09608)."""

import numpy as np
from jaxtyping import Float, Int

from seqlab.checks import UserError


def video_positions(
    tokens: Int[np.ndarray, "b t"],
    grids: Int[np.ndarray, "n 3"],
    *,
    video_token: int,
    merge: int = 2,
    seconds_per_grid: float = 1.0,
    tokens_per_second: float = 2.0,
) -> Float[np.ndarray, "b t 3"]:
    """Positions along (time, height, width) for `seqlab.models.layers.rotate` with `sections`, counted from
    the first token.

    A text token has position (p, p, p), one more than the largest previous coordinate. The tokens of a video
    that starts there have p plus their index in the grid of merged patches, vertically and horizontally, and
    in time times seconds_per_grid * tokens_per_second.

    Args:
      tokens: [b, t]; `video_token` marks each merged patch of a video, in the order time, height, width.
      grids: [n, 3], patches of each video in time, height and width, over all rows in order.
      merge: patches per token, vertically and horizontally.

    Raises ValueError if the grids do not match the video tokens.
    """
    tokens, grids = np.asarray(tokens), [tuple(map(int, grid)) for grid in np.asarray(grids)]
    shapes = iter([(t, h // merge, w // merge) for t, h, w in grids])
    out = np.zeros((*tokens.shape, 3), np.float32)
    for row, ids in enumerate(tokens):
        at, first = 0, np.float32(0)
        while at < len(ids):
            if ids[at] != video_token:
                out[row, at] = first
                at, first = at + 1, first + 1
                continue
            shape = next(shapes, (0, 0, 0))
            size = int(np.prod(shape))
            if not size or (ids[at : at + size] != video_token).any() or at + size > len(ids):
                raise UserError(
                    f"grids must account for the video tokens from place {at} of row {row} on, got {grids} "
                    f"with merge={merge}"
                )
            place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(size, 3)
            out[row, at : at + size] = first + place * np.asarray(
                [seconds_per_grid * tokens_per_second, 1, 1], np.float32
            )
            at, first = at + size, out[row, at : at + size].max() + 1
    if next(shapes, None) is not None:
        raise UserError(f"grids must account for the video tokens, more of them than videos: {grids}")
    return out
