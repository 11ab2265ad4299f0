"""llama.cpp at work, for the tests: run by a Python that has the package `xllamacpp`, which is not this project's own.

Reads one JSON object from standard input, {"model": path, "texts": [...], "prompts": [[ids], ...], "steps": n,
"probs": n, "context": n, "force": id or null}, and prints one: {"ids": [...] of each text, with BOS where the model
adds it, "runs": one a prompt, each a list of {"id": greedy token, "logprobs": {id: nats}} for `steps` tokens}. `force`
is the token taken whatever its logprob (the server tells nothing about one that ends the text or is half a letter).

One thread, keys and values in float32, no flash attention: nothing is rounded more than the weights are.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def server(path: str, context: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = context, 1, 0, 0
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def token_ids(address: str, text: str) -> list[int]:
    """As llama.cpp cuts a text, special tokens in it recognised."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)["tokens"]


def continuation(model: Any, prompt: list[int], steps: int, probs: int, force: int | None) -> list[dict[str, Any]]:
    wanted = {"prompt": prompt, "n_predict": steps, "temperature": 0, "n_probs": probs, "cache_prompt": False}
    if force is not None:
        wanted["logit_bias"] = [[force, 1000.0]]
    answer = model.handle_completions({**wanted, "ignore_eos": False, "post_sampling_probs": False})
    content = answer["choices"][0]["logprobs"]["content"]
    return [
        {"id": token["id"], "logprobs": {row["id"]: row["logprob"] for row in token["top_logprobs"]}}
        for token in content
    ]


def main() -> None:
    wanted = json.load(sys.stdin)
    model = server(wanted["model"], wanted["context"])
    rest = (wanted["steps"], wanted["probs"], wanted["force"])
    found = {
        "ids": [token_ids(model.listening_address, text) for text in wanted["texts"]],
        "runs": [continuation(model, prompt, *rest) for prompt in wanted["prompts"]],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
