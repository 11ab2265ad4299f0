"""What a process reward model says of answers: texts to steps, steps to scores. The command is eval.prm.

All answers of a prompt are branches behind it, which is run once. The score of a step is the probability that it is
right, read at its last token; the score of an answer is made from those of its steps (`trainer.prm.aggregate`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, Group, encode_records
from data_tools.schema import Message, Record, Text
from data_tools.step_rows import unlabelled
from data_tools.steps import ANSWER_LINE, Unit, split_steps
from data_tools.tokenizer import load_tokenizer
from trainer import dist, lora, lora_files, numerics
from trainer.batch import build_stream
from trainer.errors import ModelError
from trainer.export import headers
from trainer.loader import length_sorted_batches
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import REWARD_HEAD, load_decoder
from trainer.prm import PrmTable, read_table
from trainer.startup import check_vocabulary

NO_HEAD = "has no reward head; train one with train.objective = prm (docs/prm.md)"


@dataclass(frozen=True)
class Splitter:
    """How answers are cut into steps: as those were that the model learnt from."""

    unit: Unit = "line"
    pattern: re.Pattern[str] | None = None
    answer_line: re.Pattern[str] | None = ANSWER_LINE
    """Pieces at the end that begin like this only say the answer: they are no steps, unless there is nothing else."""

    def __call__(self, text: str) -> list[str]:
        found = split_steps(text, self.unit, pattern=self.pattern, answer_line=self.answer_line)
        return list(found.steps or split_steps(text, self.unit, pattern=self.pattern).steps)


@dataclass(frozen=True)
class Answers:
    """A prompt and answers to it, none of them blank. path, line: where the prompt stands, for messages."""

    id: str
    prompt: Text
    texts: tuple[str, ...]
    path: str
    line: int


@dataclass(frozen=True)
class RewardModel:
    """A frozen reward model. home: the folder that its head and table came from. base: of tokenizer and template."""

    model: Decoder
    table: PrmTable
    base: Path
    chat_template: str | None = None

    def encode(self, records: Sequence[Record]) -> list[Group]:
        """Records of kind prm as groups, none dropped or cut. Raises DataErrors."""
        options = EncodeOptions(
            kind="prm",
            max_length=None,
            chat_template=self.chat_template,
            step_separator=self.table.separator or "",
        )
        template = load_chat_template(self.base, self.chat_template)
        groups, _ = encode_records(records, load_tokenizer(self.base), template, options)
        check_vocabulary(groups, self.model.config, self.base)
        return groups

    @torch.inference_mode()
    def scores(
        self, groups: Sequence[Group], *, tokens_per_batch: int = 8192, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, list[list[float]]]]:
        """(index of the group, the steps' scores of each of its branches), longest groups first. stopped: asked between
        batches, true ends it."""
        for batch in length_sorted_batches(groups, tokens_per_batch):
            if stopped():
                return
            stream = build_stream([groups[index] for index in batch], at_tokens=True)
            logits = self.model(stream.to(self.model.embed_tokens.weight.device), output="rewards")
            parts = iter(logits.double().sigmoid().cpu().split(stream.segment_tokens.tolist()))
            for index in batch:
                next(parts)  # the prompt's, which is empty
                yield index, [next(parts).tolist() for _ in groups[index].lengths[1:]]


def table_of(folder: str | Path) -> PrmTable:
    """What the reward model in a folder says of itself. Raises ModelError where there is none."""
    table = read_table(folder)
    if table is None:
        raise ModelError(folder, NO_HEAD)
    return table


def load_reward_model(
    folder: str | Path, *, adapter: str | Path | None = None, dtype: str = "float32", chat_template: str | None = None
) -> RewardModel:
    """The model of `folder`, with an adapter's folder that holds the head or with its own head, on a GPU where PyTorch
    finds one. dtype: "float32" or "bf16". Raises ModelError where there is no head."""
    if adapter is None:
        ModelConfig.from_folder(folder)
        has_head = any(name.startswith(REWARD_HEAD) for name in headers(folder))
    else:
        has_head = bool(lora_files.read_head(adapter))
    table = table_of(adapter or folder)
    if not has_head:
        raise ModelError(adapter or folder, NO_HEAD)
    numerics.prepare_process()
    numerics.set_up(threads=None, deterministic=True, matmul="highest")
    compute = numerics.COMPUTE_DTYPES[dtype]
    settings = None if adapter is None else lora_files.read_settings(adapter)

    def prepare(model: Decoder) -> None:
        if settings is not None:
            lora.add_lora(model, settings, dtype=compute)
        model.add_reward_head(torch.float32)

    model = load_decoder(folder, dtype=compute, wrap=prepare)
    if adapter is not None:
        lora_files.load_adapter(model, adapter)
        lora_files.load_head(model, adapter)
    return RewardModel(model.requires_grad_(False).to(dist.choose_device()), table, Path(folder), chat_template)


def answer_records(answers: Sequence[Answers], split: Splitter) -> list[Record]:
    """One record a prompt, its answers in steps of which nothing is known."""
    records = []
    for own in answers:
        steps = [split(text) for text in own.texts]
        texts = ["".join(pieces) for pieces in steps]
        completions: tuple[Text, ...] = tuple(texts)
        if not isinstance(own.prompt, str):
            completions = tuple((Message("assistant", text),) for text in texts)
        record = Record(own.id, own.prompt, completions, own.path, own.line, steps=tuple(map(unlabelled, steps)))
        records.append(record)
    return records
