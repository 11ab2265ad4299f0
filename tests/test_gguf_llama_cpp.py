"""Exported GGUF files in llama.cpp itself: the same log-probs, the same tokens, the same greedy text.

LOGRATIO_LLAMA_CPP names a Python with the package `xllamacpp` (a wheel that carries llama.cpp), in an environment of
its own: `python -m venv V && V/bin/pip install xllamacpp`, then `LOGRATIO_LLAMA_CPP=V/bin/python`.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gguf_fixtures import FAMILIES, TOKENS
from tests.test_gguf_export import write_folder
from tests.test_gguf_tokenizers import TEXTS, joining_everything
from trainer.models import gguf_export, gguf_import
from trainer.models.gguf_pre import PRE_TOKENIZERS

pytestmark = pytest.mark.long
RUNNER = Path(__file__).parent / "llama_cpp_runner.py"
CASES = sorted(set(FAMILIES) - {"command-r-plus"})  # llama.cpp reads its tensors from 64 layers on


@pytest.fixture(scope="session")
def llama_cpp_python() -> str:
    python = os.environ.get("LOGRATIO_LLAMA_CPP")
    if not python:
        pytest.skip("LOGRATIO_LLAMA_CPP does not name a Python that has the package xllamacpp")
    return python


def run(
    python: str,
    model: Path,
    *,
    texts: tuple[str, ...] = (),
    prompts: list[list[int]] | None = None,
    steps: int = 1,
    probs: int = 1,
    force: int | None = None,
    context: int = 512,
) -> dict[str, Any]:
    wanted = {"model": str(model), "texts": texts, "prompts": prompts or [], "steps": steps, "probs": probs}
    text = json.dumps({**wanted, "context": context, "force": force})
    done = subprocess.run([python, str(RUNNER)], input=text, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def next_logps(model: torch.nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    return model(prompts).logits[:, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_same_logps(case: str, kind: str, llama_cpp_python: str, tmp_path: Path) -> None:
    """All log-probs after 20 tokens, a prompt longer than the sliding windows."""
    folder = write_folder(tmp_path / "in", case)
    gguf_export.export(folder, tmp_path / "out.gguf", kind=kind)
    gguf_import.convert(tmp_path / "out.gguf", tmp_path / "out")  # the weights as the file's type rounds them
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    if case == "phi3":
        model.model.config.sliding_window = None  # llama.cpp stores Phi-3's window and does not use it
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
    prompts = torch.randint(3, len(TOKENS) - 1, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = next_logps(model, prompts)
    letter = TOKENS.index("a")
    found = run(
        llama_cpp_python,
        tmp_path / "out.gguf",
        prompts=prompts.tolist(),
        probs=len(TOKENS),
        force=letter,
        context=256,  # LongRoPE's choice of factors depends on it
    )
    # llama.cpp's GELU on a CPU is a table in float16. With f16 and q8_0 weights it rounds each layer's input to that
    # type as well, so that results spread like those of rounding the weights.
    gelu = case.startswith("gemma")
    tolerance = {"f32": 5e-3 if gelu else 5e-5, "f16": 3e-2, "q8_0": 0.5}[kind]
    for row, (step,) in zip(expected, found["runs"], strict=True):
        logps = torch.tensor([step["logprobs"][str(token)] for token in range(len(TOKENS))])
        torch.testing.assert_close(logps, row, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_same_tokens(name: str, llama_cpp_python: str, tmp_path: Path) -> None:
    """A vocabulary whose merges cross words: ids show every cut that the pre-tokenizer makes."""
    spec = joining_everything(name)
    rows = len(spec["model"]["vocab"]) + 2
    folder = write_folder(tmp_path / "in", "llama", vocab_size=rows)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    named = {f"{name}_token": "<s>" for name in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings), encoding="utf-8")
    gguf_export.export(folder, tmp_path / "out.gguf")
    gguf_import.convert(tmp_path / "out.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # llama.cpp does not compose letters: no decomposed ones where the tokenizer would
    texts = tuple(text for text in [*TEXTS, "<s>a <tool>b", " a", ""] if "e\u0301" not in text)
    found = run(llama_cpp_python, tmp_path / "out.gguf", texts=texts)["ids"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer(text)["input_ids"], text


def test_sentencepiece_gives_the_same_tokens(llama_cpp_python: str, shared_dir: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", "llama", vocab_size=32000)
    AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    model = shared_dir / "data" / "tokenizers" / "mistral" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    gguf_export.export(folder, tmp_path / "out.gguf")
    lines = (shared_dir / "data" / "tokenizers" / "reference_ids.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["file"] == "mistral/tokenizer.model.v1"]
    found = run(llama_cpp_python, tmp_path / "out.gguf", texts=tuple(row["text"] for row in rows))["ids"]
    for row, ids in zip(rows, found, strict=True):
        assert ids == [1, *row["ids"]], row["text"]


PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "Write a Python function that adds two numbers.",
    "A train runs 60 km in one hour. How far does it run in 3 hours?",
]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_real_model_says_the_same(kind: str, llama_cpp_python: str, smollm2_dir: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, 48 greedy tokens: equal until two tokens are nearer than the type's rounding."""
    gguf_export.export(smollm2_dir, tmp_path / "out.gguf", kind=kind)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    rows = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = tuple(tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in rows)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = run(llama_cpp_python, tmp_path / "out.gguf", texts=texts, prompts=prompts, steps=48, probs=5)
    assert found["ids"] == prompts
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tolerance = {"f16": 0.02, "q8_0": 0.25}[kind]  # nats
    for prompt, steps in zip(prompts, found["runs"], strict=True):
        answer = [step["id"] for step in steps]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        errors = [abs(step["logprobs"][str(step["id"])] - logps[i, step["id"]].item()) for i, step in enumerate(steps)]
        behind = [(logps[i].max() - logps[i, token]).item() for i, token in enumerate(answer)]
        print(f"{kind}: {len(answer)} tokens, {sum(gap == 0 for gap in behind)} greedy, error {max(errors):.4f} nats")
        assert max(errors) < tolerance and max(behind) < 2 * tolerance
        assert np.mean([gap == 0 for gap in behind]) > 0.9
