"""The tiny model of the fixtures is one that transformers loads as it is: what is compared with it means something."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_model_loads_in_transformers_without_a_missing_weight(tiny_model_dir: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(tiny_model_dir, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (2, 2)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    logps = model(torch.arange(20)[None]).logits.log_softmax(-1)
    assert logps.std() > 0.1, "log-probs hardly differ between tokens: comparisons would prove little"


def test_tiny_tokenizer_covers_every_byte_and_ends_turns(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "the answer: 7 × ۷ = 49 日本\n\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], add_generation_prompt=True)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(ids)[i] for i in (0, -1)] == ["<|im_start|>", "Ċ"]
    assert "<|im_end|>" in tokenizer.convert_ids_to_tokens(ids)
    assert len(tokenizer) == 300
