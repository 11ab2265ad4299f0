"""Rotary position embedding as a model's config describes it: which dimensions of a head turn, and how fast.

Not here: the rotation itself (`kernels.rope`). Letters: T tokens, h head width, r <= h rotated dimensions of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies were stretched for contexts longer than those of the first training."""

    kind: str
    """linear | llama3 | yarn | dynamic | longrope"""
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Length of the first training; of `dynamic`, where stretching begins."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Both rotary tables are multiplied by it (yarn, longrope)."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rope:
    """theta: base of the frequencies. dims: r, even; the other dimensions of a head stay as they are. interleaved: the
    pairs are neighbours (2i, 2i + 1), not (i, i + r / 2)."""

    theta: float
    dims: int
    interleaved: bool = False
    scaling: RopeScaling | None = None

    @property
    def by_length(self) -> bool:
        """Do frequencies depend on a sequence's length, beyond `scaling.original_max_position_embeddings`?"""
        return self.scaling is not None and self.scaling.kind in ("dynamic", "longrope")

    def is_beyond(self, lengths: tuple[int, ...]) -> bool:
        """Of a group (prompt first): are its sequences longer than the original length, so that others apply?

        Raises ModelError where one prompt would need both kinds of frequencies, and for dynamic ones, which differ with
        each length: a prompt is computed once for all its completions.
        """
        if not self.by_length:
            return False
        original = self.scaling.original_max_position_embeddings
        longer = [lengths[0] + length > original for length in lengths[1:] or (0,)]
        if any(longer) and (self.scaling.kind == "dynamic" or not all(longer)):
            problem = f"its {self.scaling.kind} RoPE depends on a sequence's length beyond {original} tokens"
            raise ModelError(
                "model.path", f"{problem}, which a shared prompt cannot follow; set data.max_length = {original}"
            )
        return any(longer)

    def frequencies(self, *, beyond: bool = False) -> Tensor:
        """(r / 2,) float32 radians a position (Su et al. 2021, eq. 15), stretched where there is a scaling.

        beyond: of sequences longer than the original length (longrope). Scalings: linear (Chen et al. 2023), Llama 3's
        (its model card), yarn (Peng et al. 2023, eq. 23), longrope (Ding et al. 2024); dynamic leaves shorter sequences
        as they are. In the order of operations of transformers 5, so that float32 rounds alike.
        """
        exponent = torch.arange(0, self.dims, 2, dtype=torch.int64).float() / self.dims
        scaling = self.scaling
        if scaling is not None and scaling.kind == "longrope":
            stretch = torch.tensor(scaling.long_factor if beyond else scaling.short_factor)
            return 1.0 / (stretch * self.theta**exponent)
        frequencies = 1.0 / self.theta**exponent
        if scaling is None or scaling.kind == "dynamic":
            return frequencies
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        if scaling.kind == "yarn":
            kept = 1 - self._yarn_ramp(scaling)
            return 1.0 / (scaling.factor * self.theta**exponent) * (1 - kept) + frequencies * kept
        wavelength = 2 * math.pi / frequencies
        # turns within the original context: below low_freq_factor fully stretched, above high_freq_factor untouched
        turns = scaling.original_max_position_embeddings / wavelength
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return blend * frequencies + (1 - blend) * frequencies / scaling.factor

    def _yarn_ramp(self, scaling: RopeScaling) -> Tensor:
        """(r / 2,): 0 for the dimensions that turn at least beta_fast times within the original length, 1 for those
        that turn at most beta_slow times, a straight line between."""

        def dimension_of(turns: float) -> float:
            wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
            return self.dims * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        high += 0.001 if low == high else 0.0
        return ((torch.arange(self.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

    def tables(self, positions: Tensor, head_dim: int, *, beyond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, h / 2) float32 cosines and sines for heads in the order of `halves`; dimensions that stay turn by 0.

        positions (T,) int64. beyond (T,) bool: tokens of sequences longer than the original length, or None.
        """
        angles = torch.outer(positions.float(), self.frequencies().to(positions.device))
        if beyond is not None and beyond.any():
            longer = torch.outer(positions.float(), self.frequencies(beyond=True).to(positions.device))
            angles = torch.where(beyond[:, None], longer, angles)
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        rest = (0, (head_dim - self.dims) // 2)
        return F.pad(angles.cos() * factor, rest, value=1.0), F.pad(angles.sin() * factor, rest)

    def halves(self, x: Tensor) -> Tensor:
        """(..., h) in an order in which dimension i turns with i + h / 2, as `kernels.rope` wants it.

        Queries and keys go through it alike, so their products stay the same and there is no way back.
        """
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        if self.interleaved:
            turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        if not rest.shape[-1]:
            return turned
        (first, second), (third, fourth) = turned.chunk(2, dim=-1), rest.chunk(2, dim=-1)
        return torch.cat((first, third, second, fourth), dim=-1)
