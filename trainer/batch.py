"""A micro-batch as one stream of tokens: groups one after another, no padding, each prompt stored once.

Letters: T tokens of the stream, N scored tokens, S segments. Every branch of every group is one segment, the prompt
(branch 0) included: a preference pair owns three segments in the order prompt, chosen, rejected. A prompt's segment is
empty unless its tokens are scored too (ORPO's full NLL).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_tools.encode import Group


@dataclass(frozen=True)
class GroupLayout:
    """Where one group lies in the stream: `start`, then `lengths[0]` prompt tokens, then each branch's tokens."""

    start: int
    lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + sum(self.lengths)


@dataclass(frozen=True)
class Stream:
    """Groups laid one after another.

    tokens, positions: (T,) int64; positions restart at the prompt's length in every branch.
    score_index: (N,) int64, the stream position whose hidden state predicts the scored token.
    score_targets: (N,) int64, the scored tokens. score_segments: (N,) int64, the segment that owns each.
    score_ranks: (N,) int64, 0, 1, 2, ... within its segment.
    segment_tokens: (S,) int64, scored tokens a segment. branches: segments of each group, in order.
    labels: (N, 4) float32, a StepLabel of each scored token; None where the data has none.
    """

    tokens: Tensor
    positions: Tensor
    score_index: Tensor
    score_targets: Tensor
    score_segments: Tensor
    score_ranks: Tensor
    segment_tokens: Tensor
    layout: tuple[GroupLayout, ...]
    labels: Tensor | None = None

    @property
    def num_segments(self) -> int:
        return self.segment_tokens.numel()

    def to(self, device: torch.device | str) -> "Stream":
        """The same stream with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Stream(layout=self.layout, **tensors)


def build_stream(groups: Sequence[Group], *, score_prompt: bool = False, at_tokens: bool = False) -> Stream:
    """Concatenate groups into a stream on the CPU.

    `at_tokens`: score_index points at the scored tokens themselves, for what is said of them and not what predicts
    them (process rewards), labels come along, and none is left out. Else:

    The first token of *every* branch is predicted by the last prompt token. A token that nothing predicts (the very
    first one of a group, when it is to be scored) is left out. `score_prompt`: score the prompt's tokens as well.
    """
    tokens, positions, index, targets, segments, ranks, counts, layout = [], [], [], [], [], [], [], []
    start = 0
    for group in groups:
        ids = np.asarray(group.ids, dtype=np.int64)
        prompt_length = group.lengths[0]
        tokens.append(ids)
        offset = 0
        for branch, length in enumerate(group.lengths):
            first = prompt_length if branch else 0
            positions.append(np.arange(first, first + length))
            spans = ((0, length),) if score_prompt and branch == 0 else group.spans[branch]
            own = np.concatenate([np.arange(a, b) for a, b in spans]) if spans else np.empty(0, dtype=np.int64)
            before = offset + own
            if not at_tokens:
                before = np.where(own > 0, before - 1, prompt_length - 1 if branch else -1)
            own, before = own[before >= 0], before[before >= 0]
            index.append(start + before)
            targets.append(ids[offset + own])
            segments.append(np.full(len(own), len(counts)))
            ranks.append(np.arange(len(own)))
            counts.append(len(own))
            offset += length
        layout.append(GroupLayout(start, tuple(group.lengths)))
        start += offset
    parts = (tokens, positions, index, targets, segments, ranks)
    joined = [torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in parts]
    labels = [label for group in groups for own in group.labels for label in own] if at_tokens else []
    return Stream(
        *joined,
        segment_tokens=torch.tensor(counts, dtype=torch.int64),
        layout=tuple(layout),
        labels=torch.tensor(labels, dtype=torch.float32) if labels else None,
    )


def scored_tokens(group: Group, *, score_prompt: bool) -> int:
    """Tokens of a group that the objective scores: N of a stream of this group alone."""
    own = sum(stop - start for spans in group.spans for start, stop in spans)
    return own + (max(0, group.lengths[0] - 1) if score_prompt else 0)


def idle_stream() -> Stream:
    """The smallest stream there is, one prompt token and one scored token, both id 0: for a rank without a batch, whose
    forward pass must still run where all ranks gather the weights together."""
    return build_stream([Group("idle", np.zeros(2, dtype=np.int32), (1, 1), ((), ((0, 1),)))])
