"""Numbers in two, four or eight bits: a scale and a least value a group (KIVI, arXiv 2402.02750)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt


class Groups(NamedTuple):
    """What a group of numbers is coded by: x = code * scale + least."""

    scale: Float[Array, "..."]
    least: Float[Array, "..."]


def groups_of(least: Array, greatest: Array, bits: int) -> Groups:
    """Where all of a group are equal the scale is 1: the code is 0 and the number comes back exactly."""
    spread = greatest - least
    return Groups(jnp.where(spread > 0, spread / (2**bits - 1), 1), least)


def encode(x: Float[Array, "..."], groups: Groups, bits: int) -> UInt[Array, "..."]:
    """Codes of x, rounded half to even; the groups are broadcast against it."""
    return jnp.round(jnp.clip((x - groups.least) / groups.scale, 0, 2**bits - 1)).astype(jnp.uint32)


def decode(codes: UInt[Array, "..."], groups: Groups) -> Float[Array, "..."]:
    """The numbers that the codes stand for, in the dtype of the groups."""
    return codes.astype(groups.scale.dtype) * groups.scale + groups.least


def quantize(x: Float[Array, "*b d"], group: int, bits: int) -> tuple[UInt[Array, "*b d"], Groups]:
    """Codes of the last axis in groups of `group` numbers, and the groups [*b, d / group]."""
    parts = x.reshape(*x.shape[:-1], -1, group)
    groups = groups_of(parts.min(-1), parts.max(-1), bits)
    return encode(parts, Groups(*(y[..., None] for y in groups)), bits).reshape(x.shape), groups


def dequantize(codes: UInt[Array, "*b d"], groups: Groups) -> Float[Array, "*b d"]:
    """The inverse of `quantize`, but for rounding."""
    parts = codes.reshape(*groups.scale.shape, -1)
    return decode(parts, Groups(*(y[..., None] for y in groups))).reshape(codes.shape)
