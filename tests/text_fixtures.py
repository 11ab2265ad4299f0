"""Small tokenizers and templates, made on the spot, for the tests of what happens to text. Not a test itself."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools.schema import Message

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SENTENCES = (
    "How many apples are left when Ada gives two of her nine apples away?",
    "First, 9 - 2 = 7. The answer is 7.",
    "Ice floats because water expands when it freezes.",
    "def double(x): return 2 * x",
    "You are a careful tutor. Answer in one short paragraph.",
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


def write_config(folder: Path, **settings: object) -> Path:
    """`tokenizer_config.json` with the given settings; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def byte_level_folder(folder: Path, *, post_processor_bos: bool = False, **settings: object) -> Path:
    """A byte-level BPE that can spell any text, with ChatML and Llama-like special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if post_processor_bos:
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    defaults = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    write_config(folder, **{**defaults, **settings})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def spaced_folder(folder: Path, *, rule: str, **settings: object) -> Path:
    """A BPE that puts a space before text: by Metaspace ("first", "always") or as a normalizer ("prepend")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if rule == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=rule)
    tokenizer.decoder = decoders.Metaspace()
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", *SPECIALS)]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([word for sentence in SENTENCES for word in sentence.split()], trainer)
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": WITH_BOS}
    write_config(folder, **{**defaults, **settings})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_folder(folder: Path, **settings: object) -> Path:
    """A sentencepiece BPE with byte fallback, as the first Llama had; a config file only if settings are given."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return write_config(folder, **settings) if settings else folder


def smollm2_folder(folder: Path, source: Path) -> Path:
    """SmolLM2's tokenizer from vocab.json, merges.txt and special_tokens.json in `source`."""
    special = json.loads((source / "special_tokens.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(row["token"], special=True, normalized=False) for row in special["control"]]
    tokenizer.add_special_tokens(control)
    names = {row["id"]: row["token"] for row in special["control"]}
    write_config(
        folder,
        bos_token=names[special["bos_id"]],
        eos_token=names[special["eos_id"]],
        chat_template=special["chat_template"],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def talk(*turns: str, system: str | None = None, first: str = "user") -> tuple[Message, ...]:
    """Messages by turns, `first` first; a system message before them if given."""
    other = {"user": "assistant", "assistant": "user"}
    messages = [] if system is None else [Message("system", system)]
    role = first
    for turn in turns:
        messages.append(Message(role, turn))
        role = other[role]
    return tuple(messages)
