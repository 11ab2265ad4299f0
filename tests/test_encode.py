"""Rows to groups: the ids TRL has, spans by length alone, BOS and EOS once, and what happens to over-long rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import CHATML, WITH_BOS, byte_level_folder, smollm2_folder, spaced_folder, talk

from data_tools.chat_template import ChatTemplate, load_chat_template
from data_tools.encode import EncodeOptions, EncodeReport, Group, encode_prompts, encode_records
from data_tools.errors import DataErrors, TemplateError, TokenizerError, UserError
from data_tools.jsonl import read_records
from data_tools.schema import Message, Record, Text
from data_tools.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
NO_LIMIT = EncodeOptions(max_length=None)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = byte_level_folder(tmp_path_factory.mktemp("bos"), post_processor_bos=True, eos_token="</s>")
    return load_tokenizer(folder)


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(
        source, path=Path("model/chat_template.jinja"), tokens={"bos_token": "<s>", "eos_token": "</s>"}
    )


def record(prompt: Text, *completions: Text, name: str = "row", weight: float = 1.0) -> Record:
    return Record(id=name, prompt=prompt, completions=completions, path="rows.jsonl", line=3, weight=weight)


def encode_one(row: Record, tokenizer: Tokenizer, source: str = CHATML, **options: object) -> Group:
    chosen = EncodeOptions(**{"max_length": None, **options})  # type: ignore[arg-type]
    groups, _ = encode_records([row], tokenizer, template(source), chosen)
    (group,) = groups
    return group


def branches(group: Group) -> list[list[int]]:
    """Ids of each branch, after checking what holds for every group."""
    assert group.ids.dtype == "int32" and group.ids.shape == (sum(group.lengths),)
    assert len(group.spans) == len(group.lengths) and group.spans[0] == ()
    out, start = [], 0
    for length, spans in zip(group.lengths, group.spans, strict=True):
        flat = [edge for span in spans for edge in span]
        assert flat == sorted(set(flat)) and all(0 <= edge <= length for edge in flat)
        out.append(group.ids[start : start + length].tolist())
        start += length
    assert all(group.lengths[1:]) and all(group.spans[1:]), "a completion is never empty"
    return out


def scored_texts(group: Group, tokenizer: Tokenizer, branch: int) -> list[str]:
    ids = branches(group)[branch]
    return [tokenizer.decode(ids[start:end]) for start, end in group.spans[branch]]


# --- the ids of TRL and of the template ---------------------------------------------------------------------------


def assert_ids_of_trl(groups: Sequence[Group], tokens: list[dict[str, list[int]]]) -> None:
    assert len(groups) == len(tokens) == 16
    for group, expected in zip(groups, tokens, strict=True):
        prompt, chosen, rejected = branches(group)
        assert prompt == expected["prompt_ids"]
        assert (chosen, rejected) == (expected["chosen_ids"], expected["rejected_ids"])
        assert group.spans == ((), ((0, len(chosen)),), ((0, len(rejected)),))


@pytest.mark.parametrize("pairs", ["own_16.jsonl", "pairs_16.jsonl"])
def test_ids_are_those_of_trl(shared_dir: Path, tmp_path: Path, pairs: str) -> None:
    folder = smollm2_folder(tmp_path, shared_dir / "data" / "tokenizers" / "smollm2")
    records = read_records([shared_dir / "oracles" / pairs], kind="pair")
    oracle = "own_dpo_orpo.json" if pairs == "own_16.jsonl" else "trl_dpo_orpo.json"
    tokens = json.loads((shared_dir / "oracles" / oracle).read_text(encoding="utf-8"))["dpo"]["tokens"]
    groups, report = encode_records(records, load_tokenizer(folder), load_chat_template(folder), EncodeOptions())
    assert_ids_of_trl(groups, tokens)
    assert (report.rows, report.kept, report.dropped_overlong) == (16, 16, 0)


def test_ids_are_those_of_trl_with_the_converted_model(smollm2_dir: Path) -> None:
    records = read_records([GOLDEN / "own_16.jsonl"], kind="pair")
    tokens = json.loads((GOLDEN / "own_dpo_orpo.json").read_text(encoding="utf-8"))["dpo"]["tokens"]
    groups, _ = encode_records(records, load_tokenizer(smollm2_dir), load_chat_template(smollm2_dir), EncodeOptions())
    assert_ids_of_trl(groups, tokens)


words = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)
odd_turns = st.integers(0, 2).flatmap(lambda k: st.lists(words, min_size=2 * k + 1, max_size=2 * k + 1))


@settings(max_examples=50, deadline=None)
@given(prompt=odd_turns, chosen=odd_turns, rejected=odd_turns, system=st.none() | words)
def test_tokens_spell_the_rendered_conversation_and_spans_the_assistants_part(
    chatml: Tokenizer, prompt: list[str], chosen: list[str], rejected: list[str], system: str | None
) -> None:
    if chosen == rejected:
        return
    asked = talk(*prompt, system=system)
    answers = [talk(*turns, first="assistant") for turns in (chosen, rejected)]
    group = encode_one(record(asked, *answers), chatml)
    start, *ends = map(chatml.decode, branches(group))
    assert start == template().render(asked, add_generation_prompt=True)
    for k, (turns, answer) in enumerate(zip((chosen, rejected), answers, strict=True)):
        assert start + ends[k] == template().render([*asked, *answer], add_generation_prompt=False)
        assert scored_texts(group, chatml, k + 1) == [f"{text}<|im_end|>\n" for text in turns[::2]]


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from(["short", "turns", "plain"]), min_size=1, max_size=8))
def test_a_row_is_encoded_the_same_in_any_company(chatml: Tokenizer, names: list[str]) -> None:
    rows = {
        "short": record(talk("q"), talk("a", first="assistant")),
        "turns": record(talk("q", "a", "r"), talk("b", "s", "c", first="assistant")),
        "plain": record("Question:", " Answer"),
    }
    together, _ = encode_records([rows[name] for name in names], chatml, template(), NO_LIMIT)
    for name, group in zip(names, together, strict=True):
        alone = encode_one(rows[name], chatml)
        assert (group.ids.tolist(), group.lengths, group.spans) == (alone.ids.tolist(), alone.lengths, alone.spans)


def test_end_tokens_in_the_answer_do_not_end_the_mask(chatml: Tokenizer) -> None:
    """Padding, EOS and end-of-turn may share an id: only lengths decide."""
    group = encode_one(record(talk("q"), talk("<|im_end|> a <|im_end|><|endoftext|>", first="assistant")), chatml)
    assert group.spans[1] == ((0, group.lengths[1]),)
    assert scored_texts(group, chatml, 1) == ["<|im_end|> a <|im_end|><|endoftext|><|im_end|>\n"]


def test_weight_and_id_are_kept(chatml: Tokenizer) -> None:
    group = encode_one(record("q", "a", "b", name="seven", weight=0.25), chatml)
    assert (group.record_id, group.weight) == ("seven", 0.25)


# --- rows of strings, BOS and EOS ---------------------------------------------------------------------------------


def test_strings_get_eos_but_not_twice(chatml: Tokenizer) -> None:
    group = encode_one(record("Question: ", "7", "8<|im_end|>"), chatml, special_tokens="control")
    prompt, chosen, rejected = branches(group)
    assert prompt == chatml.encode("Question: ")
    assert chosen == [*chatml.encode("7"), chatml.eos_id] and rejected == [*chatml.encode("8"), chatml.eos_id]
    assert group.spans == ((), ((0, len(chosen)),), ((0, len(rejected)),))


def test_strings_get_bos_but_not_twice(with_bos: Tokenizer) -> None:
    for prompt in ("Question", "<s>Question"):
        ids = branches(encode_one(record(prompt, "7"), with_bos, special_tokens="control"))[0]
        assert ids == [with_bos.bos_id, *with_bos.encode("Question")]
    group = encode_one(record("", "A story"), with_bos)
    assert branches(group)[0] == [with_bos.bos_id]
    assert group.spans[1] == ((0, group.lengths[1]),)


def test_chats_get_bos_from_the_template_alone(with_bos: Tokenizer) -> None:
    row = record(talk("Hi"), talk("Hello", first="assistant"))
    prompt, completion = branches(encode_one(row, with_bos, WITH_BOS))
    assert (prompt + completion).count(with_bos.bos_id) == 1 and prompt[0] == with_bos.bos_id
    assert completion[-1] == with_bos.eos_id and completion.count(with_bos.eos_id) == 1
    prompt, _ = branches(encode_one(row, with_bos, CHATML))
    assert with_bos.bos_id not in prompt


def test_completions_continue_where_a_tokenizer_would_put_a_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spaced_folder(tmp_path, rule="first"))
    row = record(talk("answer the", "apples", "two"), talk("nine apples", "give two", "answer", first="assistant"))
    group = encode_one(row, tokenizer, WITH_BOS)
    whole = template(WITH_BOS).render([*row.prompt, *row.completions[0]], add_generation_prompt=False)  # type: ignore[list-item]
    assert group.ids.tolist() == tokenizer.encode(whole)
    assert scored_texts(group, tokenizer, 1) == ["nine apples</s>", "answer</s>"]


def test_first_token_without_anything_before_it_is_not_scored(chatml: Tokenizer) -> None:
    rows = [record("", "A story", name="a"), record("Say", "A story", name="b")]
    (story, said), report = encode_records(rows, chatml, None, NO_LIMIT)
    assert (story.lengths[0], story.spans[1]) == (0, ((1, story.lengths[1]),))
    assert said.spans[1] == ((0, said.lengths[1]),)
    assert report.no_bos_unscored == 1
    assert "1 rows have no prompt and no BOS: their first token is not scored" in report.lines()


# --- rows that are too long ---------------------------------------------------------------------------------------


LONG = record("a b c d e f", "one two", "one three four", name="long")


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(3, 40),
    overlong=st.sampled_from(["drop", "truncate_prompt_left", "truncate_completion"]),
    prompt=st.text("ab ", max_size=20),
    ends=st.lists(st.text("cd", min_size=1, max_size=20), min_size=1, max_size=2, unique=True),
)
def test_no_kept_row_is_too_long_and_no_completion_empty(
    with_bos: Tokenizer, limit: int, overlong: str, prompt: str, ends: list[str]
) -> None:
    row = record(prompt, *ends)
    full = branches(encode_one(row, with_bos))
    options = EncodeOptions(max_length=limit, overlong=overlong)  # type: ignore[arg-type]
    guard = record("", "c", name="fits")  # BOS, one token, EOS
    groups, report = encode_records([row, guard], with_bos, None, options)
    assert (report.rows, report.kept + report.dropped_overlong) == (2, 2)
    assert report.longest == max(group.lengths[0] + max(group.lengths[1:]) for group in groups) <= limit
    if groups[0].record_id != "row":
        assert report.dropped_ids[0] == "row" and len(full[0]) + max(map(len, full[1:])) > limit
        return
    kept = branches(groups[0])
    if overlong == "drop":
        assert kept == full
    elif overlong == "truncate_prompt_left":
        assert kept[0] and kept[1:] == full[1:] and kept[0][1:] == full[0][len(full[0]) - len(kept[0]) + 1 :]
        assert report.truncated_prompts == (kept != full)
    else:
        assert kept[0] == full[0]
        assert all(whole[: len(cut)] == cut for cut, whole in zip(kept[1:], full[1:], strict=True))
        assert report.truncated_completions == sum(cut != whole for cut, whole in zip(kept, full, strict=True))
        assert all(
            len(cut) == min(len(whole), limit - len(full[0])) for cut, whole in zip(kept[1:], full[1:], strict=True)
        )


def test_drop_is_counted_and_named(chatml: Tokenizer) -> None:
    rows = [record("q", "a", "b", name="fits"), *(record("q" * 50, "a", "b", name=f"long-{k}") for k in range(7))]
    groups, report = encode_records(rows, chatml, None, EncodeOptions(max_length=20))
    assert [group.record_id for group in groups] == ["fits"]
    assert report.dropped_overlong == 7 and report.dropped_ids == tuple(f"long-{k}" for k in range(5))
    assert report.lines() == [
        "1 of 8 rows kept, longest 3 tokens",
        "7 over-long rows dropped, first: long-0, long-1, long-2, long-3, long-4",
    ]


def test_prompt_cut_on_the_left_keeps_bos_and_one_token(with_bos: Tokenizer) -> None:
    prompt, *ends = branches(encode_one(LONG, with_bos))
    longest = max(map(len, ends))
    for room in (1, 2, 4):
        group = encode_one(LONG, with_bos, max_length=longest + room, overlong="truncate_prompt_left")
        expected = prompt[-1:] if room == 1 else [with_bos.bos_id, *prompt[1 - room :]]
        assert branches(group) == [expected, *ends]
    with pytest.raises(UserError, match="all 1 rows are longer than data.max_length"):
        encode_one(LONG, with_bos, max_length=longest, overlong="truncate_prompt_left")


def test_completions_cut_at_the_end(chatml: Tokenizer) -> None:
    prompt, chosen, rejected = branches(encode_one(LONG, chatml))
    group = encode_one(LONG, chatml, max_length=len(prompt) + len(chosen), overlong="truncate_completion")
    assert branches(group) == [prompt, chosen, rejected[: len(chosen)]]
    shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert shared > 0
    for room in (0, shared):  # nothing left, or the same beginning left of both
        with pytest.raises(UserError, match="now truncate_completion"):
            encode_one(LONG, chatml, max_length=len(prompt) + room, overlong="truncate_completion")


def test_cutting_a_conversation_cuts_its_spans(chatml: Tokenizer) -> None:
    row = record(talk("q"), talk("aa", "rr", "bb", first="assistant"))
    full = encode_one(row, chatml)
    (first, second) = full.spans[1]
    for kept, spans in ((second[0] + 1, (first, (second[0], second[0] + 1))), (second[0], (first,)), (2, ((0, 2),))):
        cut = encode_one(row, chatml, max_length=full.lengths[0] + kept, overlong="truncate_completion")
        assert (cut.lengths[1], cut.spans[1]) == (kept, spans)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "must be at least 2"),
        ({"overlong": "cut"}, "must be one of drop"),
        ({"special_tokens": "both"}, "data.special_tokens = 'both': must be text or control"),
        ({"kind": "x"}, "pair or"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        EncodeOptions(**options)


# --- rows that cannot be encoded ----------------------------------------------------------------------------------


def errors_of(rows: list[Record], tokenizer: Tokenizer, source: str, **options: object) -> str:
    chosen = EncodeOptions(**{"max_length": None, **options})  # type: ignore[arg-type]
    with pytest.raises(DataErrors) as caught:
        encode_records(rows, tokenizer, template(source), chosen)
    return str(caught.value)


def test_a_template_that_changes_what_it_said_names_row_place_and_remedy(chatml: Tokenizer) -> None:
    thinking = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    message = errors_of([record(talk("q"), talk("a", first="assistant"))], chatml, thinking)
    assert message.startswith(
        "rows.jsonl:3: chat template model/chat_template.jinja changes the text before the answer"
    )
    assert "assistant\\n<think>\\n' becomes" in message and "assistant\\na<|im_end|>" in message
    assert "data.chat_template" in message and "assistant turn" not in message
    forgetful = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}{% endfor %}"
    message = errors_of([record(talk("q"), talk("a", "r", "b", first="assistant"))], chatml, forgetful)
    assert "'qa' becomes 'qr' at character 1" in message and "or give one row for each assistant turn" in message


def test_errors_of_templates_name_the_row(chatml: Tokenizer) -> None:
    strict = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    rows = [record(talk("q"), talk("a", first="assistant"))] * 2
    message = errors_of(rows, chatml, strict)
    line = "rows.jsonl:3: model/chat_template.jinja: chat template: one turn only"
    assert message.splitlines() == [line, line, "2 errors"]
    assert errors_of(rows * 15, chatml, strict).splitlines()[20:] == ["20 errors, the rest was not checked"]


def test_a_template_that_asks_for_the_date_is_named(chatml: Tokenizer) -> None:
    row = record(talk("q"), talk("a", first="assistant"))
    dated = ChatTemplate("{{ strftime_now('%Y') }}" + CHATML, path=Path("t"), tokens={})
    line = "the chat template asks for the date: it is told 2024-07-26, whatever the day is"
    assert encode_records([row], chatml, dated, NO_LIMIT)[1].lines()[-1] == line
    assert len(encode_records([record("q", "a")], chatml, dated, NO_LIMIT)[1].lines()) == 1


def test_a_template_that_drops_the_answer_is_an_error(chatml: Tokenizer) -> None:
    message = errors_of([record(talk("q"), talk("a", first="assistant"))], chatml, "{{ messages[0].content }}")
    assert "prints nothing for the assistant's message" in message


def test_pairs_that_become_the_same_tokens_are_an_error(chatml: Tokenizer) -> None:
    stripping = CHATML.replace("message['content']", "message['content'] | trim")
    row = record(talk("q"), talk("a", first="assistant"), talk("a ", first="assistant"))
    assert "field 'rejected': becomes the same tokens as 'chosen'" in errors_of([row], chatml, stripping)


def test_a_lone_end_token_without_prompt_cannot_be_scored(chatml: Tokenizer) -> None:
    message = errors_of([record("", "<|im_end|>")], chatml, CHATML, special_tokens="control")
    assert "field 'completion': nothing to score: its only token has no prompt to be predicted from" in message


def test_missing_template_or_eos_is_said_once(chatml: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"no chat template.*first: rows.jsonl:3.*data.chat_template"):
        encode_records([record(talk("q"), talk("a", first="assistant"))] * 3, chatml, None, NO_LIMIT)
    no_eos = load_tokenizer(byte_level_folder(tmp_path, eos_token=None))
    with pytest.raises(TokenizerError, match=r"no eos_token.*first: rows.jsonl:3.*tokenizer_config.json"):
        encode_records([record("q", "a")], no_eos, None, NO_LIMIT)


def test_no_rows_are_no_groups(chatml: Tokenizer) -> None:
    assert encode_records([], chatml, None, NO_LIMIT) == ([], EncodeReport())


@pytest.mark.parametrize("special_tokens", ["text", "control"])
def test_prompts_alone_are_the_prompts_of_rows(special_tokens: str, chatml: Tokenizer, with_bos: Tokenizer) -> None:
    """Plain and as messages, with and without a spelling of a control token; completions change nothing."""
    for tokenizer, source in ((chatml, CHATML), (with_bos, WITH_BOS)):
        for text in ("2 + 5?", "say <|im_end|> or </s>"):
            for prompt, completion in ((text, "7"), (talk(text), (Message("assistant", "7"),))):
                rows = [record(prompt, completion), record(prompt)]
                whole = branches(encode_one(rows[0], tokenizer, source, special_tokens=special_tokens))[0]
                found = encode_prompts(rows, tokenizer, template(source), special_tokens=special_tokens)
                assert found == [whole, whole]
