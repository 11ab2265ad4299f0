"""Log-likelihood scores against the same rule through transformers, item by item: options of questions, solutions.

The oracle runs every option as a sequence of its own, prompt and option in one, and reads the option's tokens off the
logits. Ours runs the prompt once with the options as branches.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_tools.chat_template import load_chat_template
from data_tools.encode import Group
from data_tools.errors import DataError
from data_tools.samples import messages_of
from data_tools.tokenizer import load_tokenizer
from eval.items import Item, read_items
from eval.loglikelihood import Likelihood, best, likelihoods, option_groups
from eval.task import Task, load_task, parse_task
from trainer.score import load_for_scoring

SETS = (
    ("choice_logprob", "medqa"),
    ("choice_letter", "medqa"),
    ("choice_logprob", "mmlu_med"),
    ("choice_letter", "mmlu_med"),
    ("perplexity", "gsm8k"),
)
CHAT = {
    "name": "chat",
    "kind": "choice_logprob",
    "prompt": {"system": "Be brief.", "text": "{question}\n{options}", "completion": "{text}"},
}


def ours(model_dir: Path, items: Sequence[Item]) -> tuple[list[Group], list[list[Likelihood]]]:
    tokenizer = load_tokenizer(model_dir)
    groups = option_groups(items, tokenizer, load_chat_template(model_dir), "data.jsonl")
    model = load_for_scoring(model_dir, "float32")
    found = dict(likelihoods(model, groups, [item.completions for item in items], tokens_per_batch=4096))
    return groups, [found[index] for index in range(len(items))]


class Oracle:
    """transformers' own tokenizer and model; nothing of ours."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def prompt_ids(self, item: Item) -> list[int]:
        if isinstance(item.prompt, str):
            return self.tokenizer(item.prompt).input_ids
        text = self.tokenizer.apply_chat_template(messages_of(item.prompt), add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def score(self, item: Item, text: str) -> tuple[float, int]:
        prompt = self.prompt_ids(item)
        option = self.tokenizer(text, add_special_tokens=False).input_ids
        targets = torch.tensor((prompt + option)[max(len(prompt), 1) :])
        kept = len(targets) + 1  # logits before these would cost most of the time
        logits = self.model(torch.tensor([prompt + option]), logits_to_keep=kept).logits[0].float()
        logps = F.log_softmax(logits[:-1], dim=-1).gather(1, targets[:, None])
        return float(logps.double().sum()), len(targets)

    def joint_ids(self, item: Item, text: str) -> list[int]:
        """Prompt and option tokenized as one text, the way other harnesses do."""
        return self.tokenizer(item.prompt + text).input_ids


def compare(model_dir: Path, task: Task, items: Sequence[Item], tolerance: float) -> dict[str, int]:
    """Every score of every item within `tolerance` nats a token, the same choice by every rule; counts."""
    groups, scores = ours(model_dir, items)
    oracle = Oracle(model_dir)
    counts = {"items": 0, "texts": 0, "other_joint": 0}
    for item, group, own in zip(items, groups, scores, strict=True):
        theirs = [oracle.score(item, text) for text in item.completions]
        for mine, (logps, tokens), text in zip(own, theirs, item.completions, strict=True):
            assert mine.tokens == tokens and mine.bytes == len(text.encode())
            assert mine.logps == pytest.approx(logps, abs=tolerance * max(tokens, 1)), (item.id, text)
            counts["texts"] += 1
        assert list(group.ids[: group.lengths[0]]) == oracle.prompt_ids(item)
        for rule in ("sum", "per_token", "per_byte"):
            values = [Likelihood(logps, tokens, own[i].bytes).by(rule) for i, (logps, tokens) in enumerate(theirs)]
            close = sorted(values)[-2:]
            if len(values) == 1 or close[1] - close[0] > 2 * tolerance * max(tokens for _, tokens in theirs):
                assert best(own, rule) == values.index(max(values)), (item.id, rule)
        if isinstance(item.prompt, str):
            first = list(group.ids[: group.lengths[0] + group.lengths[1]])
            counts["other_joint"] += first != oracle.joint_ids(item, item.completions[0])
        counts["items"] += 1
    return counts


@pytest.mark.parametrize(("task", "data"), SETS)
def test_a_few_items_on_the_tiny_model(task: str, data: str, shared_dir: Path, tiny_model_dir: Path) -> None:
    """float32 on both sides; sums over up to 200 tokens differ by rounding only."""
    loaded = load_task(task)
    items = read_items(loaded, shared_dir / "data" / data / "test.jsonl", limit=3)
    assert compare(tiny_model_dir, loaded, items, 1e-5)["items"] == 3


def test_chat_prompts_on_the_tiny_model(shared_dir: Path, tiny_model_dir: Path) -> None:
    task = parse_task(CHAT)
    items = read_items(task, shared_dir / "data" / "mmlu_med" / "test.jsonl", limit=3)
    assert compare(tiny_model_dir, task, items, 1e-5)["texts"] == 12


@pytest.mark.long
@pytest.mark.parametrize(("task", "data"), [own for own in SETS if own != ("choice_letter", "medqa")])
def test_hundred_items_on_smollm2(task: str, data: str, shared_dir: Path, smollm2_dir: Path) -> None:
    """Tokens differ by float32 rounding through 30 layers: 2e-4 nats a token at most."""
    loaded = load_task(task)
    items = read_items(loaded, shared_dir / "data" / data / "test.jsonl", limit=100)
    counts = compare(smollm2_dir, loaded, items, 2e-4)
    assert counts["items"] == 100
    assert counts["other_joint"] == 0


def test_an_empty_prompt_without_bos_scores_from_the_second_token(tiny_model_dir: Path) -> None:
    item = Item(id="x", subject="all", line=1, prompt="", options={}, gold=None, completions=("the answer",))
    groups, ((score,),) = ours(tiny_model_dir, [item])
    adds_bos = load_tokenizer(tiny_model_dir).adds_bos
    assert score.tokens == len(load_tokenizer(tiny_model_dir).encode("the answer")) - (0 if adds_bos else 1)
    assert (score.logps, score.tokens) == pytest.approx(Oracle(tiny_model_dir).score(item, "the answer"), abs=1e-4)


def test_a_text_without_a_scored_token_is_an_error(tiny_model_dir: Path) -> None:
    item = Item(id="x", subject="all", line=7, prompt="", options={}, gold=None, completions=("a",))
    with pytest.raises(DataError, match=r"data.jsonl:7: nothing to score in 'a'"):
        option_groups([item], load_tokenizer(tiny_model_dir), None, "data.jsonl")


def test_an_option_goes_on_where_the_prompt_ends(shared_dir: Path, tmp_path: Path) -> None:
    """sentencepiece puts a space before a text that begins a sequence; an option begins none."""
    model = shared_dir / "data" / "tokenizers" / "mistral" / "tokenizer.model.v1"
    shutil.copy(model, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    item = Item(id="x", subject="all", line=1, prompt="un", options={}, gold=None, completions=("done", " done"))
    (group,) = option_groups([item], tokenizer, None, "data.jsonl")
    prompt, first, _ = (int(length) for length in group.lengths)
    ids = group.ids.tolist()
    assert tokenizer.decode(ids[: prompt + first]).endswith("undone")
    assert tokenizer.decode(ids[:prompt] + ids[prompt + first :]).endswith("un done")


def test_it_ends_between_batches_when_asked(tiny_model_dir: Path) -> None:
    items = [Item(id=i, subject="", line=1, prompt="a b", options={}, gold=None, completions=(" c d",)) for i in "xyz"]
    groups = option_groups(items, load_tokenizer(tiny_model_dir), None, "data.jsonl")
    asked = iter([False, False, True])
    model, texts = load_for_scoring(tiny_model_dir, "float32"), [item.completions for item in items]
    found = likelihoods(model, groups, texts, tokens_per_batch=1, stopped=lambda: next(asked))
    assert len(list(found)) == 2


def test_rules_by_hand() -> None:
    """-6 over 3 tokens and 12 bytes against -5 over 1 token and 4 bytes: the shorter wins the sum alone."""
    scores = [Likelihood(-6.0, 3, 12), Likelihood(-5.0, 1, 4)]
    assert [best(scores, rule) for rule in ("sum", "per_token", "per_byte")] == [1, 0, 0]
    assert best([Likelihood(-1.0, 1, 1), Likelihood(-1.0, 1, 1)], "sum") == 0
