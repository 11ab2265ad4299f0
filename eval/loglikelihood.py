"""How likely a model finds given texts after a prompt: options of a question, a reference solution.

An item is a group: its prompt is run once, and the texts are its branches, each on its own after the prompt. No EOS is
scored. A text is tokenized by itself as what follows the prompt's last token. Letters: see trainer.batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_tools.chat_template import ChatTemplate
from data_tools.encode import Group, encode_prompts
from data_tools.errors import DataError
from data_tools.schema import Record
from data_tools.tokenizer import Tokenizer
from eval.items import Item
from trainer import losses
from trainer.batch import build_stream
from trainer.loader import length_sorted_batches
from trainer.models.decoder import Decoder

RULES = ("sum", "per_token", "per_byte")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one text: the sum of its tokens' log-probs in nats, how many tokens were scored, its bytes as UTF-8."""

    logps: float
    tokens: int
    bytes: int

    def by(self, rule: str) -> float:
        """The number that `rule` compares: sum | per_token | per_byte."""
        return self.logps / {"sum": 1, "per_token": self.tokens, "per_byte": self.bytes}[rule]


def option_groups(
    items: Sequence[Item], tokenizer: Tokenizer, template: ChatTemplate | None, path: str | Path
) -> list[Group]:
    """Each item as a group: its prompt, then a branch a completion. Raises DataError where one has nothing to score."""
    records = [Record(id=item.id, prompt=item.prompt, completions=(), path=str(path), line=item.line) for item in items]
    prompts = encode_prompts(records, tokenizer, template)
    texts = [text for item in items for text in item.completions]
    lasts = [
        prompt[-1] if prompt else None for item, prompt in zip(items, prompts, strict=True) for _ in item.completions
    ]
    branches = iter(tokenizer.encode_plain_batch(texts, lasts))
    groups = []
    for item, prompt in zip(items, prompts, strict=True):
        own = [next(branches) for _ in item.completions]
        for text, ids in zip(item.completions, own, strict=True):
            if len(ids) < (1 if prompt else 2):
                problem = (
                    f"nothing to score in {text[:40]!r}: the tokenizer makes no token of it that something predicts"
                )
                raise DataError(path, item.line, field=None, problem=problem)
        ids = np.array([token for part in (prompt, *own) for token in part], dtype=np.int32)
        spans = ((), *(((0 if prompt else 1, len(part)),) for part in own))
        groups.append(Group(item.id, ids, (len(prompt), *map(len, own)), spans))
    return groups


@torch.inference_mode()
def likelihoods(
    model: Decoder,
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    *,
    tokens_per_batch: int = 8192,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, list[Likelihood]]]:
    """(index of the group, one Likelihood a branch), batch by batch, longest groups first.

    texts: of the branches. stopped: asked between batches, true ends it.
    """
    for batch in length_sorted_batches(groups, tokens_per_batch):
        if stopped():
            return
        stream = build_stream([groups[index] for index in batch])
        token_logps = model(stream.to(model.head_weight.device)).cpu()
        sums = iter(losses.segment_sums(token_logps, stream.score_segments, stream.num_segments).tolist())
        counts = iter(stream.segment_tokens.tolist())
        for index in batch:
            next(sums), next(counts)  # the prompt's segment, which is empty
            yield index, [Likelihood(next(sums), next(counts), len(text.encode())) for text in texts[index]]


def best(scores: Sequence[Likelihood], rule: str) -> int:
    """The branch that is likeliest by `rule`; of equals the first."""
    values = [score.by(rule) for score in scores]
    return values.index(max(values))
