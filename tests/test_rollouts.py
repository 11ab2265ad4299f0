"""Labels of steps from completions, worked by hand: counts, early ends, the search for the first error, the control."""

from pathlib import Path
from typing import Any

import pytest
from pool_fixtures import attempt, rows_of, write_answers

from data_tools import rollouts, verify
from data_tools.jsonl import read_records, write_rows
from data_tools.pipeline_plan import says_stop
from data_tools.pool import write_pool
from data_tools.rollouts import hard_label, steps_wanted
from data_tools.samples import Sample, prompt_digest, read_prompts, row_of
from data_tools.steps import split_steps
from eval import sample
from trainer.entry import exit_code

ANSWER = "2 + 3 = 5\n5 * 2 = 11\n11 - 1 = 10\nThe answer is 10"


@pytest.mark.parametrize(
    ("tally", "k", "delta", "label"),
    [
        ((0, 8), 8, 0, 0), ((1, 8), 8, 0, 1), ((1, 1), 8, 0, 1), ((0, 7), 8, 0, None), ((0, 0), 8, 0, None),
        ((2, 8), 8, 2, 0), ((3, 4), 8, 2, 1), ((1, 7), 8, 2, 0), ((1, 6), 8, 2, None), ((0, 9), 8, 0, 0),
    ],
)  # fmt: skip
def test_when_a_label_is_decided(tally: tuple[int, int], k: int, delta: int, label: int | None) -> None:
    assert hard_label(tally, k, delta) == label


def test_the_first_error_by_halving() -> None:
    for count in range(1, 9):
        for first in range(count + 1):
            truth = [int(step < first) for step in range(count)]
            known: list[int | None] = [None] * count
            rounds = 0
            while None in (found := steps_wanted(known, "first_error"))[1]:
                (new,) = [step for step in found[0] if known[step] is None]
                known[new] = truth[new]
                rounds += 1
            assert found[1] == truth and rounds <= count.bit_length()
    assert steps_wanted([1, None, None, None], "first_error") == ([1], [None] * 4)
    assert steps_wanted([None, 1, None, None], "first_error") == ([1, 2], [1, 1, None, None])
    assert steps_wanted([1, None], "all") == ([0, 1], [1, None])


class Stage:
    """The files of one run in a folder, and a simulator that is right as often as it is told for each beginning."""

    def __init__(self, folder: Path, rights: dict[str, list[bool]]) -> None:
        self.folder, self.rights = folder, rights
        self.paths, self.labels, self.outcome = (folder / f"{name}.jsonl" for name in ("paths", "labels", "outcome"))
        self.files = [folder / f"{name}.jsonl" for name in ("R", "S", "V")]

    def ask(self, *options: str, again: bool = False) -> dict[str, int]:
        """The requests as id to n."""
        drawn = [part for pair in zip(("--drawn", "--samples", "--verdicts"), self.files, strict=True) for part in pair]
        command = ["requests", "--paths", str(self.paths), "--out", str(self.files[0]), *options]
        assert rollouts.main([*command, *(map(str, drawn) if again else [])]) == 0
        return {row["id"]: row["settings"]["n"] for row in rows_of(self.files[0])}

    def draw(self) -> None:
        samples, verdicts = [], []
        for prompt in read_prompts(self.files[0]):
            for number in range(prompt.settings["n"]):
                right = self.rights[prompt.prefix][number]
                fixed = {"finish_reason": "stop", "model": "m", "settings_digest": "s"}
                samples.append(Sample(id=prompt.id, sample=number, text="x", prompt_digest=prompt.digest, **fixed))
                verdicts.append({"id": prompt.id, "sample": number, "verdict": "correct" if right else "wrong"})
        self.files[1].write_bytes(b"".join(map(row_of, samples)))
        write_rows(self.files[2], verdicts)

    def label(self, *options: str) -> list[dict[str, Any]]:
        given = [
            part for pair in zip(("--requests", "--samples", "--verdicts"), self.files, strict=True) for part in pair
        ]
        outs = ["--out", str(self.labels), "--outcome-out", str(self.outcome)]
        assert rollouts.main(["labels", "--paths", str(self.paths), *map(str, given), *outs, *options]) == 0
        return rows_of(self.labels)


@pytest.fixture
def stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage:
    """Two answers of three steps that begin with the same one, and a known solution."""
    other = ANSWER.replace("11", "10").replace("10 - 1 = 10", "so 10 it is")
    pool, gold = tmp_path / "pool.jsonl", tmp_path / "gold.jsonl"
    write_pool(
        pool, [attempt(ANSWER, "wrong"), attempt(other, sample=1), attempt("The answer is 3", "wrong", sample=2)]
    )
    write_rows(gold, [{"id": "q", "answer": "2+3=<<2+3=5>>5\n5*2=<<5*2=10>>10\n#### 10"}])
    first = split_steps(ANSWER, "line").steps
    second = split_steps(other, "line").steps
    rights = {
        first[0]: [True, False, True, False],
        "".join(first[:2]): [False] * 4,
        "".join(first[:3]): [False] * 4,
        "".join(second[:2]): [False, False, True, True],
        "".join(second[:3]): [True] * 4,
    }
    made = Stage(tmp_path, rights)
    known = ["--gold-paths", str(gold), "--gold-drop", "<<.*?>>"]
    assert rollouts.main(["paths", "--pool", str(pool), "--split", "line", *known, "--out", str(made.paths)]) == 0
    said = f"3 paths (1 known solutions), 8 steps in {made.paths}; dropped: 1 without a step\n"
    assert capsys.readouterr().out == said
    return made


def test_paths_in_steps(stage: Stage) -> None:
    wrong, right, gold = rows_of(stage.paths)
    assert wrong["steps"] == ["2 + 3 = 5\n", "5 * 2 = 11\n", "11 - 1 = 10\n"] and wrong["rest"] == "The answer is 10"
    assert [(row["id"], row["correct"], row["gold"]) for row in (wrong, right, gold)] == [
        ("q#0", False, False), ("q#1", True, False), ("q#gold", True, True),
    ]  # fmt: skip
    assert gold["steps"] == ["2+3=5\n", "5*2=10\n"] and gold["rest"] == "#### 10" and gold["prompt"] == "q?"


def test_labels_of_all_steps(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    found = stage.ask("--k", "4", "--max-tokens", "100")
    assert found == {"q#0#0": 4, "q#0#1": 4, "q#0#2": 4, "q#1#1": 4, "q#1#2": 4}  # the first step is shared
    cost = (
        "2 paths, 6 steps: 5 beginnings (1 steps share one); 20 completions to draw, at most 2000 tokens; 2 paths open"
    )
    assert cost in capsys.readouterr().out
    row = rows_of(stage.files[0])[1]
    assert row["prefix"] == "2 + 3 = 5\n5 * 2 = 11\n" and row["settings"] == {"n": 4, "max_tokens": 100}
    stage.draw()
    wrong, right, gold = stage.label("--k", "4")
    assert (wrong["counts"], wrong["hard"], wrong["soft"]) == ([2, 0, 0], [1, 0, 0], [0.5, 0.0, 0.0])
    assert (right["counts"], right["hard"], right["soft"]) == ([2, 2, 4], [1, 1, 1], [0.5, 0.5, 1.0])
    assert (gold["counts"], gold["hard"], gold["soft"], gold["K"]) == ([4, 4], [1, 1], [1.0, 1.0], 4)
    assert wrong["completions"] == [4, 4, 4] and not wrong["correct"] and right["correct"]
    assert "3 paths, 6 steps right and 2 wrong" in capsys.readouterr().out
    assert [row["hard"] for row in rows_of(stage.outcome)] == [[0, 0, 0], [1, 1, 1], [1, 1]]
    assert [row["id"] for row in rows_of(stage.outcome)] == [row["id"] for row in rows_of(stage.labels)]
    # delta 2: more than two of four
    assert [row["hard"] for row in stage.label("--k", "4", "--delta", "2")] == [[0, 0, 0], [0, 0, 1], [1, 1]]
    for path in (stage.labels, stage.outcome):
        assert [len(record.steps[0].ends) for record in read_records([path], kind="prm")] == [3, 3, 2]


def test_decided_labels_need_no_more(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time, delta 0: one right completion decides for 1, all four wrong for 0."""
    state = stage.folder / "state"
    options = ("--k", "4", "--at-once", "2", "--state", str(state))
    first = stage.ask(*options)
    assert set(first.values()) == {2}
    stage.draw()
    names = {"q#0#0": 2, "q#0#1": 4, "q#0#2": 4, "q#1#1": 4, "q#1#2": 2}
    assert stage.ask(*options, again=True) == names
    assert "6 completions to draw" in (shown := capsys.readouterr().out) and "2 paths open" in shown
    assert state.read_text() == "go on\n2 paths open, 6 completions to draw\n" and not says_stop(str(state))
    stage.draw()
    assert stage.ask(*options, again=True) == names
    assert "0 completions to draw" in (shown := capsys.readouterr().out) and "; 0 paths open" in shown
    assert state.read_text() == "stop\n0 paths open, 0 completions to draw\n" and says_stop(str(state))
    wrong, right, _ = stage.label("--k", "4")
    assert wrong["hard"] == [1, 0, 0] and right["hard"] == [1, 1, 1]  # as with all completions
    assert wrong["counts"] == [1, 0, 0] and wrong["completions"] == [2, 4, 4]


def test_labels_of_earlier_rounds_come_first_and_once(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.ask("--k", "4")
    stage.draw()
    first = stage.label("--k", "4")
    before = [stage.labels.rename(stage.folder / "l1.jsonl"), stage.outcome.rename(stage.folder / "o1.jsonl")]
    earlier = ["--earlier", str(before[0]), "--earlier-outcome", str(before[1])]
    assert stage.label("--k", "4", *earlier) == first and rows_of(stage.outcome) == rows_of(before[1])
    assert "3 labelled before" in capsys.readouterr().out
    # Of the pool's rounds one alone.
    write_pool(stage.folder / "p2.jsonl", [attempt(ANSWER, "wrong"), attempt(ANSWER, id="q#r2", round=2)])
    paths = ["paths", "--pool", str(stage.folder / "p2.jsonl"), "--split", "line", "--only-round", "2"]
    assert rollouts.main([*paths, "--out", str(stage.paths)]) == 0
    assert [(row["id"], row["round"]) for row in rows_of(stage.paths)] == [("q#r2.0", 2)]
    assert "dropped: 1 of other rounds" in capsys.readouterr().out
    command = ["labels", "--paths", str(stage.paths), "--requests", str(stage.files[0]), "--samples"]
    more = [str(stage.files[1]), "--verdicts", str(stage.files[2]), "--out", str(stage.labels), *earlier[:2]]
    assert rollouts.main([*command, *more, "--outcome-out", str(stage.outcome)]) == 2
    assert "give it where both are given" in capsys.readouterr().err


def test_the_search_asks_for_few(stage: Stage) -> None:
    options = ("--k", "4", "--search", "first_error")
    assert stage.ask(*options) == {"q#0#1": 4, "q#1#1": 4}
    stage.draw()
    assert stage.ask(*options, again=True) == {"q#0#1": 4, "q#0#0": 4, "q#1#1": 4, "q#1#2": 4}
    stage.draw()
    before = stage.files[0].read_bytes()
    stage.ask(*options, again=True)
    assert stage.files[0].read_bytes() == before
    wrong, right, gold = stage.label(*options)
    assert wrong["hard"] == [1, 0, 0] and wrong["counts"] == [2, 0, None] and wrong["soft"] is None
    assert right["hard"] == [1, 1, 1] and right["counts"] == [None, 2, 4] and gold["hard"] == [1, 1]
    assert len(read_records([stage.labels], kind="prm")) == 3


def test_paths_with_steps_that_were_not_completed_are_dropped(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.ask("--k", "4")
    requests = [row for row in rows_of(stage.files[0]) if row["id"] != "q#0#2"]
    write_rows(stage.files[0], [row | {"settings": {"n": 4 if row["id"] != "q#1#1" else 2}} for row in requests])
    stage.draw()
    assert [row["id"] for row in stage.label("--k", "4")] == ["q#gold"]
    assert capsys.readouterr().out.endswith("dropped: 1 a step without completions, 1 a label still open\n")
    assert len(rows_of(stage.outcome)) == 1


def test_a_real_sampler_goes_on_and_the_whole_is_judged(tmp_path: Path, tiny_model_dir: Path) -> None:
    """From the pool to labels by the commands as they stand; a random model never reaches 5, the last step says it."""
    files = write_answers(tmp_path, {"q": [("It is.\nSo 5.\n", "correct"), ("No.\n7\n", "wrong")]})
    stage = Stage(tmp_path, {})
    tasks = tmp_path / "q.jsonl"
    write_rows(tasks, [{"id": "q", "question": "q?", "gold": 5}])
    source = [*files, "--questions", str(tasks)]
    assert rollouts.main(["paths", *source, "--split", "line", "--out", str(stage.paths)]) == 0
    assert stage.ask("--k", "2", "--max-tokens", "1") == {"q#0#0": 2, "q#0#1": 2, "q#1#0": 2, "q#1#1": 2}
    requests, samples, verdicts = map(str, stage.files)
    assert exit_code(sample.main, ["--model", str(tiny_model_dir), "--prompts", requests, "--out", samples]) == 0
    judge = ["--kind", "number", "--tasks", str(tasks), "--samples", samples, "--out", verdicts, "--prompts", requests]
    assert verify.main(judge) == 0
    right, wrong = stage.label("--k", "2")
    assert right["counts"][0] == 0 and right["hard"][0] == 0 and wrong["hard"] == [0, 0]
    assert right["counts"][1] == sum(row["verdict"] == "correct" for row in rows_of(stage.files[2]))
    assert right["hard"][1] == int(right["counts"][1] > 0)


def test_what_cannot_be(tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "o")
    assert rollouts.main(["requests", "--paths", str(stage.paths), "--samples", "s", "--out", out]) == 2
    assert "completions so far: give the requests, --samples and --verdicts, or none" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    write_rows(bad, [{**rows_of(stage.paths)[0], "steps": ["a", " "]}])
    assert rollouts.main(["requests", "--paths", str(bad), "--out", out]) == 2
    assert capsys.readouterr().err == f"error: {bad}:1: field 'steps': expected texts, none of them blank\n"
    assert prompt_digest("q?") != prompt_digest("q?", "2 + 3 = 5\n")
