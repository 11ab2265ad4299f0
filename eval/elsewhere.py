"""Answers of a judge or a verifier that were drawn elsewhere, each held against what it was asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.samples import Sample, digest_of, read_samples
from trainer.errors import UserError


def answers_to(prompts: Sequence[Mapping[str, Any]], path: str, who: str) -> dict[str, Sample]:
    """The first sample of every prompt, by id. Raises UserError where one is missing or answers another text."""
    said = {sample.id: sample for sample in read_samples(path).samples if sample.sample == 0}
    again = f"`python -m eval.main prompts --for {who}`, then eval.sample"
    for row in prompts:
        if row["id"] not in said:
            raise UserError(f"{path}: has no answer to '{row['id']}'; make the file anew with {again}")
        if said[row["id"]].prompt_digest != digest_of(row["prompt"]):
            raise UserError(
                f"{path}: id '{row['id']}' answers another text than is asked now; make it anew with {again}"
            )
    return {row["id"]: said[row["id"]] for row in prompts}
