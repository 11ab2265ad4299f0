"""Labelled steps for tests: random groups, rows of small sums, and a plain padded reward model. Not a test itself."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from model_fixtures import VOCABULARY, _padded_logits
from torch import Tensor

from data_tools.encode import Group
from data_tools.step_rows import StepLabel
from trainer.models.config import ModelConfig


def random_steps(branches: Sequence[Sequence[int]], *, prompt: int = 3, seed: int = 0, weight: float = 1.0) -> Group:
    """A group whose branches are steps of these lengths in tokens, each step with random labels."""
    generator = np.random.default_rng(seed)
    lengths = (prompt, *(sum(steps) for steps in branches))
    ends = [np.cumsum(steps).tolist() for steps in branches]
    labels = []
    for steps in branches:
        right = float(generator.integers(0, 2))
        own = [StepLabel(float(generator.integers(0, 2)), float(generator.random()), right) for _ in steps]
        labels.append((*own[:-1], own[-1]._replace(final=right)))
    return Group(
        record_id=f"row{seed}",
        ids=generator.integers(0, VOCABULARY, sum(lengths), dtype=np.int32),
        lengths=lengths,
        spans=((), *(tuple((end - 1, end) for end in own) for own in ends)),
        weight=weight,
        labels=((), *labels),
    )


def many_steps(number: int, *, weighted: bool = True) -> list[Group]:
    """Groups of one, two and three branches, steps of one token and an empty prompt among them."""
    generator = np.random.default_rng(5)
    groups = [random_steps([[1, 1, 2], [4]], seed=100), random_steps([[2, 3]], prompt=0, seed=101, weight=0.5)]
    for seed in range(number - len(groups)):
        branches = [
            generator.integers(1, 5, generator.integers(1, 5)).tolist() for _ in range(generator.integers(1, 4))
        ]
        weight = float(generator.choice([0.25, 1.0, 3.0])) if weighted else 1.0
        groups.append(random_steps(branches, prompt=int(generator.integers(1, 6)), seed=seed, weight=weight))
    return groups


def padded_rewards(parameters: dict[str, Tensor], config: ModelConfig, groups: Sequence[Group]) -> list[Tensor]:
    """Log-odds of the steps of every branch of every group, from prompt + branch as one padded row each."""
    rows, places = [], []
    for group in groups:
        prompt, *branches = torch.from_numpy(group.ids.astype(np.int64)).split(group.lengths)
        rows += [torch.cat([prompt, branch]) for branch in branches]
        places += [[len(prompt) + end - 1 for _, end in spans] for spans in group.spans[1:]]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weight = parameters["reward_head.weight"]
    identity = torch.eye(config.hidden_size, dtype=weight.dtype)  # as a head: logits are the last hidden states
    untied = replace(config, tie_word_embeddings=False)
    hidden_BLD = _padded_logits(parameters | {"lm_head.weight": identity}, untied, ids_BL)
    return [hidden_BLD[row, own] @ weight[0] + parameters["reward_head.bias"] for row, own in enumerate(places)]


def write_steps(path: Path, number: int = 16, *, seed: int = 0, start: int = 0) -> Path:
    """Rows of sums in three steps, some with a wrong step: from there on nothing is right."""
    generator = np.random.default_rng(seed)
    rows = []
    for k in range(start, start + number):
        a, b, c = generator.integers(1, 10, 3).tolist()
        wrong = int(generator.integers(0, 6))  # the step that goes wrong; 3 and above: none
        results = [a + b, a + b + c, a + b + c]
        shown = [value + (3 if wrong <= step else 0) for step, value in enumerate(results)]
        steps = [f"{a} + {b} = {shown[0]}.\n", f"{shown[0]} + {c} = {shown[1]}.\n", f"The answer is {shown[2]}."]
        hard = [int(step < wrong) for step in range(3)]
        soft = [0.875 if right else 0.0 for right in hard]
        prompt = [{"role": "user", "content": f"What is {a} + {b} + {c}?"}]
        rows.append({"id": f"q{k}#0", "question_id": f"q{k}", "prompt": prompt, "steps": steps, "hard": hard,
                     "soft": soft, "correct": wrong >= 3})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
