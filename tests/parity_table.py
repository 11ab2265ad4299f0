"""Every family of decoders against transformers, as a table: `python tests/parity_table.py [FAMILY ...]`.

For each variant in family_fixtures, two seeds: the largest difference of logits over one text, of log-probs over a
stream of pairs with shared prompts (transformers scores each completion alone), of each gradient over its largest
entry; and whether an export is what was imported, tensors bit for bit and the other files byte for byte.
tests/test_families.py holds the numbers to their bounds.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from family_fixtures import VARIANTS, VOCABULARY, Variant  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GenerationConfig, PreTrainedModel  # noqa: E402

from data_tools.encode import Group  # noqa: E402
from trainer.batch import build_stream  # noqa: E402
from trainer.export import export  # noqa: E402
from trainer.models.hf_weights import hf_name, load_decoder  # noqa: E402

LENGTHS = [(9, 11, 4), (1, 1, 17), (13, 6, 6, 2), (2, 20)]
"""Prompts and completions; sliding windows of 5 to 9 tokens end in prompts, in completions and at the border."""


@dataclass(frozen=True)
class Parity:
    """Largest differences: of logits and log-probs as they are, of gradients over each tensor's largest entry."""

    logits: float
    logps: float
    gradient: float
    gradient_of: str
    round_trip: bool


def measure(variant: Variant, seed: int, *, impl: str = "auto") -> Parity:
    """Both models in float32, from one folder that transformers wrote. impl: of our operators."""
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name) / "model"
        theirs = variant.model(seed)
        theirs.save_pretrained(folder)
        GenerationConfig(max_new_tokens=7).save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "é"}), encoding="utf-8")
        ours = load_decoder(folder)
        ours.kernel_impl = impl
        groups = [_group(lengths, seed * 100 + index) for index, lengths in enumerate(LENGTHS)]
        logits = _logits_difference(ours, theirs, _group((31,), seed))
        found, expected = ours(build_stream(groups)), _logps(theirs, groups)
        weights = torch.linspace(-1, 1, len(found))
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        by_name = dict(theirs.named_parameters())
        relative = {
            name: _largest(parameter.grad - by_name[hf_name(name)].grad) / _largest(by_name[hf_name(name)].grad)
            for name, parameter in ours.named_parameters()
        }
        worst = max(relative, key=relative.__getitem__)
        export(ours.named_parameters(), source=folder, folder=Path(name) / "export")
        same = _same_folders(folder, Path(name) / "export")
        return Parity(logits, _largest(found - expected), relative[worst], worst, same)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' notes on odd configs and its progress bars say nothing here."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _group(lengths: tuple[int, ...], seed: int) -> Group:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths), dtype=np.int32)
    return Group(f"row{seed}", ids, lengths, ((), *(((0, length),) for length in lengths[1:])))


@torch.no_grad()
def _logits_difference(ours: torch.nn.Module, theirs: PreTrainedModel, group: Group) -> float:
    expected = theirs(torch.from_numpy(group.ids).long()[None]).logits[0]
    return _largest(ours(build_stream([group]), output="logits") - expected)


def _logps(theirs: PreTrainedModel, groups: list[Group]) -> Tensor:
    """(N,) in stream order, each completion behind its own copy of the prompt."""
    rows = []
    for group in groups:
        prompt, *completions = torch.from_numpy(group.ids).long().split(group.lengths)
        for completion in completions:
            ids = torch.cat([prompt, completion])
            logps = theirs(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rows.append(logps.gather(1, completion[:, None]).squeeze(1))
    return torch.cat(rows)


def _largest(values: Tensor) -> float:
    return values.detach().abs().max().item()


def _same_folders(source: Path, exported: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (source, exported))
    tensors = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    names = [{path.name for path in folder.iterdir()} for folder in (source, exported)]
    others = names[0] - {"model.safetensors"}
    return (
        tensors
        and names[0] == names[1]
        and all((source / name).read_bytes() == (exported / name).read_bytes() for name in others)
    )


def main(wanted: list[str]) -> int:
    """Print the table; 1 where a row is out of bounds."""
    print(f"{'family':26}{'seed':>5}{'logits':>10}{'log-probs':>11}{'gradient':>10}  round trip")
    bad = 0
    for name, variant in VARIANTS.items():
        if wanted and not any(name.startswith(each) for each in wanted):
            continue
        for seed in (0, 1):
            row = measure(variant, seed)
            good = row.round_trip and max(row.logits, row.logps) <= LOGIT_BOUND and row.gradient <= GRADIENT_BOUND
            bad += not good
            same = "bit-equal" if row.round_trip else "DIFFERS"
            print(
                f"{name:26}{seed:>5}{row.logits:>10.1e}{row.logps:>11.1e}{row.gradient:>10.1e}  {same}"
                + ("" if good else "  OUT OF BOUNDS")
            )
    return int(bad > 0)


LOGIT_BOUND = 1e-5
"""Absolute, of logits of a few units: float32 rounds the sums of 60 products of both models by about 1e-6 of them."""
GRADIENT_BOUND = 2e-5
"""Of each gradient's largest entry."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
