"""Streams: positions, which hidden state predicts which token, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import random_group

from data_tools.encode import Group
from trainer.batch import GroupLayout, build_stream, idle_stream
from trainer.models.hf_weights import load_decoder


def group(ids: list[int], lengths: tuple[int, ...], spans: tuple) -> Group:
    return Group("row", np.array(ids, dtype=np.int32), lengths, spans)


def two_pairs() -> list[Group]:
    """The picture of the design: prompt 3, chosen 3, rejected 4; then prompt 2, chosen 2, rejected 2."""
    return [
        group(list(range(10, 20)), (3, 3, 4), ((), ((0, 3),), ((0, 4),))),
        group(list(range(20, 26)), (2, 2, 2), ((), ((0, 2),), ((0, 2),))),
    ]


def test_two_pairs_by_hand() -> None:
    stream = build_stream(two_pairs())
    assert stream.tokens.tolist() == list(range(10, 26))
    assert stream.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1, 2, 3, 2, 3]
    assert stream.layout == (GroupLayout(0, (3, 3, 4)), GroupLayout(10, (2, 2, 2)))
    # the first token of chosen (13) and of rejected (16) are both predicted at stream position 2, the prompt's end
    assert stream.score_targets.tolist() == [13, 14, 15, 16, 17, 18, 19, 22, 23, 24, 25]
    assert stream.score_index.tolist() == [2, 3, 4, 2, 6, 7, 8, 11, 12, 11, 14]
    assert stream.score_segments.tolist() == [1, 1, 1, 2, 2, 2, 2, 4, 4, 5, 5]
    assert stream.score_ranks.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1]
    assert stream.segment_tokens.tolist() == [0, 3, 4, 0, 2, 2]
    assert stream.num_segments == 6
    assert {value.dtype for value in vars(stream).values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_scored_prompt_leaves_out_its_first_token() -> None:
    stream = build_stream(two_pairs(), score_prompt=True)
    assert stream.segment_tokens.tolist() == [2, 3, 4, 1, 2, 2]
    of_prompts = (stream.score_segments == 0) | (stream.score_segments == 3)
    assert stream.score_targets[of_prompts].tolist() == [11, 12, 21]
    assert stream.score_index[of_prompts].tolist() == [0, 1, 10]


def test_an_empty_prompt_predicts_nothing() -> None:
    stream = build_stream([group([1, 2, 3, 4, 5], (0, 3, 2), ((), ((0, 3),), ((0, 2),)))])
    assert stream.positions.tolist() == [0, 1, 2, 0, 1]
    assert stream.score_targets.tolist() == [2, 3, 5]
    assert stream.score_index.tolist() == [0, 1, 3]
    assert stream.segment_tokens.tolist() == [0, 2, 1]


def test_unscored_turns_are_skipped_and_ranks_run_on() -> None:
    stream = build_stream([group(list(range(8)), (2, 6), ((), ((0, 2), (4, 6))))])
    assert stream.score_targets.tolist() == [2, 3, 6, 7]
    assert stream.score_index.tolist() == [1, 2, 5, 6]
    assert stream.score_ranks.tolist() == [0, 1, 2, 3]


def test_equal_tokens_do_not_matter() -> None:
    """What is scored comes from lengths: a stream of one repeated id (padding, end of turn, ...) is scored as any."""
    same = [group([2] * 10, (3, 3, 4), ((), ((0, 3),), ((0, 4),)))]
    assert build_stream(same).score_index.tolist() == build_stream(two_pairs()[:1]).score_index.tolist()


def test_to_moves_every_tensor() -> None:
    moved = build_stream(two_pairs()).to("meta")
    devices = {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)}
    assert devices == {"meta"}
    assert moved.layout == build_stream(two_pairs()).layout


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    score_prompt=st.booleans(),
)
def test_every_scored_token_once(lengths: list[tuple[int, list[int]]], score_prompt: bool) -> None:
    """Each scored token follows, in its branch's own text, the token whose hidden state predicts it."""
    groups = [random_group((prompt, *rest), seed=seed) for seed, (prompt, rest) in enumerate(lengths)]
    stream = build_stream(groups, score_prompt=score_prompt)
    predecessor_and_target = []
    for each in groups:
        parts = np.split(each.ids, np.cumsum(each.lengths)[:-1])
        texts = [parts[0] if score_prompt else parts[0][:0], *(np.concatenate([parts[0], part]) for part in parts[1:])]
        firsts = [1, *(max(1, len(parts[0])) for _ in parts[1:])]
        for text, first in zip(texts, firsts, strict=True):
            predecessor_and_target += [(int(text[i - 1]), int(text[i])) for i in range(first, len(text))]
    found = list(zip(stream.tokens[stream.score_index].tolist(), stream.score_targets.tolist(), strict=True))
    assert found == predecessor_and_target
    assert (
        stream.segment_tokens.tolist() == torch.bincount(stream.score_segments, minlength=stream.num_segments).tolist()
    )


@pytest.mark.parametrize("writable", [True, False])
def test_groups_are_left_as_they_are(writable: bool) -> None:
    """Groups of a shard are views of a read-only file."""
    pair = two_pairs()[0]
    pair.ids.setflags(write=writable)
    before = pair.ids.copy()
    stream = build_stream([pair])
    stream.tokens.zero_()
    assert (pair.ids == before).all()


def test_the_idle_stream_is_one_token_scored_after_one(tiny_model_dir: Path) -> None:
    stream = idle_stream()
    assert stream.tokens.tolist() == [0, 0] and stream.positions.tolist() == [0, 1]
    assert stream.score_index.tolist() == [0] and stream.score_targets.tolist() == [0]
    assert stream.segment_tokens.tolist() == [0, 1]
    logps = load_decoder(tiny_model_dir)(stream)
    assert logps.shape == (1,) and logps.isfinite().all()
