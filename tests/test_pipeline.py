"""A recipe runs once, again only where something changed, in loops that end when told, and says what it would do.

Real processes throughout: tests/pipeline_fixtures.py has the recipe. In `good` models all answers are right, in others
those of odd number are wrong; so of 4 answers 2 are right in round 1 and 4 from round 2 on.
"""

import json
import os
import re
from pathlib import Path

import pytest
from pipeline_fixtures import Tiny, stages_run

ALL = [
    "questions",
    *(f"{name} [round {turn}]" for turn in (1, 2) for name in ("draw", "verify", "decide")),
    "pool",
]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


def test_every_stage_runs_once_and_a_second_run_does_nothing(tiny: Tiny) -> None:
    out, _ = tiny.run()
    assert stages_run(out) == ALL
    # What a command said last stands behind its stage.
    assert "verify [round 1]: done" in out and "4 samples: 2 correct, 2 wrong, 0 invalid" in out
    models = [json.loads(line)["model"] for line in (tiny.work / "pool.jsonl").read_text().splitlines()]
    assert models == ["first"] * 4 + ["good-1"] * 4
    before = {path: path.stat().st_mtime_ns for path in tiny.work.rglob("*")}
    out, _ = tiny.run()
    assert stages_run(out) == [] and "0 stages run" in out and "8 up to date" in out
    after = {path: path.stat().st_mtime_ns for path in tiny.work.rglob("*")}
    # The memo of digests is a cache: files that are old enough by now are remembered in it.
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"digests.json", ".lock", "pipeline"}


def test_a_changed_setting_reruns_what_depends_on_it_and_no_more(tiny: Tiny) -> None:
    tiny.run()
    # Another number of turns: the samples of rounds 1 and 2 stand, round 3 is new, the pool reads one file more.
    out, _ = tiny.run("--set", "stop_at=3")
    third = [f"{name} [round 3]" for name in ("draw", "verify", "decide")]
    assert stages_run(out) == ["decide [round 1]", "decide [round 2]", *third, "pool"]
    assert len((tiny.work / "pool.jsonl").read_text().splitlines()) == 12
    # Back again: what round 3 left stays on the disk and belongs to no stage.
    out, _ = tiny.run()
    assert stages_run(out) == ["decide [round 1]", "decide [round 2]", "pool"]
    assert len((tiny.work / "pool.jsonl").read_text().splitlines()) == 8
    assert "round3" not in (tiny.work / "provenance.json").read_text()


def test_the_same_bytes_made_again_leave_later_stages_alone(tiny: Tiny) -> None:
    tiny.run()
    tiny.programs.write_text(tiny.programs.read_text() + "\n# a word more\n")
    # All stages that read the program run again; verify does not read it, and its inputs come out the same.
    out, _ = tiny.run()
    assert stages_run(out) == [name for name in ALL if not name.startswith("verify")]
    assert "input {recipe}/programs.py changed" in out


def test_appended_files_of_other_inputs_are_kept_under_another_name(tiny: Tiny) -> None:
    tiny.run()
    samples = tiny.work / "round1" / "samples.jsonl"
    old = samples.read_bytes()
    out, _ = tiny.run("--set", "count=5")
    assert "work/round1/samples.jsonl is kept as work/round1/samples.jsonl.old" in out
    assert samples.with_name("samples.jsonl.old").read_bytes() == old
    assert len(samples.read_text().splitlines()) == 5
    five = samples.read_bytes()
    tiny.run("--set", "count=3")
    assert samples.with_name("samples.jsonl.old").read_bytes() == old
    assert samples.with_name("samples.jsonl.old2").read_bytes() == five


def test_outputs_that_are_gone_or_edited_are_made_again_and_edits_are_kept(tiny: Tiny) -> None:
    tiny.run()
    wanted = tiny.files()
    (tiny.work / "round2" / "verdicts.jsonl").unlink()
    out, _ = tiny.run()
    assert stages_run(out) == ["verify [round 2]"] and "verdicts.jsonl is gone" in out
    for name in ("questions.jsonl", "round1/samples.jsonl"):
        path = tiny.work / name
        path.write_text(path.read_text().replace("q1", "qX"))
    out, _ = tiny.run()
    assert stages_run(out) == ["questions", "draw [round 1]"]
    files = tiny.files()
    assert "qX" in (tiny.work / "questions.jsonl.old").read_text()
    assert "qX" in (tiny.work / "round1" / "samples.jsonl.old").read_text()
    assert {name: own for name, own in files.items() if not name.endswith(".old")} == wanted


def test_a_moved_work_folder_is_up_to_date(tiny: Tiny) -> None:
    tiny.run()
    os.rename(tiny.work, tiny.folder / "elsewhere")
    out, _ = tiny.run("--set", "work=elsewhere")
    assert stages_run(out) == []


def test_from_takes_edited_files_as_they_are_and_only_runs_one(tiny: Tiny) -> None:
    tiny.run()
    path = tiny.work / "round2" / "samples.jsonl"
    path.write_text(path.read_text().replace("It is 2.", "It is 3."))
    out, _ = tiny.run("--from", "verify.round2")
    assert stages_run(out) == ["verify [round 2]", "decide [round 2]", "pool"]
    assert "It is 3." in (tiny.work / "pool.jsonl").read_text()
    out, _ = tiny.run("--only", "draw")
    assert stages_run(out) == ["draw [round 2]"]
    _, err = tiny.run("--only", "drew", code=2)
    stages = "questions, draw, verify, decide, pool"
    assert err == f"error: --only drew: no such stage (did you mean 'draw'?); stages: {stages}\n"


def test_a_loop_ends_before_its_first_turn_where_nothing_is_left_to_do(tiny: Tiny) -> None:
    """An empty file ends a loop, too: of round 0, one that a stage before the loop made."""
    tiny.edit(
        '"{work}/questions.jsonl"]\n\n[[stage]]\nname = "draw"',
        '"{work}/questions.jsonl", "{work}/round0/state"]\n\n[[stage]]\nname = "draw"',
    )
    tiny.programs.write_text(
        tiny.programs.read_text().replace(
            "def draw",
            'def questions(out, count):\n    whole(out, "{}")\n    whole("work/round0/state", "")\n\ndef draw',
        )
    )
    out, _ = tiny.run()
    assert stages_run(out) == ["questions", "pool"]
    assert (tiny.work / "pool.jsonl").read_text() == ""


def test_loops_in_loops_and_lists_among_the_settings(tiny: Tiny) -> None:
    """Turns of the inner loop within each turn of the outer; a list becomes several arguments, an empty one none."""
    tiny.recipe.write_text(
        """
        name = "nested"
        work = "work"
        [settings]
        words = ["a b", "c"]
        none = []
        more = true
        fewer = false
        [loops.round]
        times = 2
        [loops.turn]
        times = "{previous}"
        [[stage]]
        name = "outer"
        each = "round"
        command = ["sh", "-c", "echo $0 $# > $1", "{round}", "{work}/r{round}", "{words}", "{none}"]
        outputs = ["{work}/r{round}"]
        [[stage]]
        name = "inner"
        each = ["round", "turn"]
        command = ["sh", "-c", "cat $2 > $1", "x", "{work}/r{round}t{turn}", "{work}/r{round}"]
        inputs = ["{work}/r{round}"]
        outputs = ["{work}/r{round}t{turn}"]
        [[stage]]
        name = "last"
        each = "round"
        command = ["sh", "-c", "echo {last_turn} {previous_round} > $0", "{work}/last{round}"]
        outputs = ["{work}/last{round}"]
        [[stage]]
        name = "no"
        when = "fewer"
        command = ["false"]
        outputs = ["{work}/last"]
        [[stage]]
        name = "yes"
        unless = "fewer"
        command = ["sh", "-c", "cat $@", "{work}/last", "{work}/last{each_round}"]
        outputs = ["{work}/last"]
        inputs = ["{work}/last{each_round}"]
        """.replace('"sh", "-c", "cat $@"', '"sh", "-c", "out=$0; cat $@ > $out"')
    )
    out, _ = tiny.run()
    assert stages_run(out) == [
        "outer [round 1]",
        "last [round 1]",
        "outer [round 2]",
        "inner [round 2, turn 1]",
        "last [round 2]",
        "yes",
    ]
    assert (tiny.work / "r2").read_text() == "2 3\n"  # $1 is the path, then "a b" and "c"
    assert (tiny.work / "r2t1").read_text() == "2 3\n"
    # `times` of the inner loop is the outer's turn before: none in round 1, one in round 2.
    assert (tiny.work / "last").read_text() == "0 0\n1 1\n"


def test_the_plan_counts_what_is_known_and_writes_nothing(tiny: Tiny) -> None:
    out, _ = tiny.run("--plan")
    assert not tiny.work.exists()
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert len(lines) == 1 + 1 + 4 * 3 + 1 + 1  # head, questions, four rounds, pool, sums
    assert re.search(r"questions +to do: first time", lines["questions"])
    assert re.search(r"waits for questions +\? +\? +\? +\?$", lines["draw [round 1]"])

    tiny.run("--only", "questions")
    out, _ = tiny.run("--plan")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    # 4 prompts, one sample each, of at most 10 tokens; "0 + 0 = ?" has 9 bytes, 2 tokens. No speed is known yet.
    assert re.search(r"to do: first time +4 +8 +40 +\?$", lines["draw [round 1]"])
    assert re.search(r"waits for draw \[round 1\]", lines["verify [round 1]"])
    assert re.search(r"1 of 14 done +16 +32 +160 ", lines["all"])

    tiny.run()
    before = sorted(tiny.work.rglob("*"))
    out, _ = tiny.run("--plan", "--set", "stop_at=5")
    assert sorted(tiny.work.rglob("*")) == before
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert re.search(r"done +-", lines["draw [round 2]"])
    # Round 2 drew 20 tokens in s seconds, so that 40 take 2 s.
    record = json.loads((tiny.work / "pipeline" / "draw.round2.json").read_text())["run"]
    assert record["calls"] == 4 and record["completion_tokens"] == 20
    assert abs(record["tokens_per_s"] - 20 / record["seconds"]) < 0.01 * record["tokens_per_s"]
    found = re.search(r"to do: first time +4 +8 +40 +([\d.]+) s$", lines["draw [round 3]"])
    assert found and abs(float(found[1]) - 2 * record["seconds"]) < 0.01 * 2 * record["seconds"]

    out, _ = tiny.run("--plan", "--set", "count=6")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert re.search(r"waits for questions +\? \(last 4\) +\? +\? \(last 20\)", lines["draw [round 1]"])


def test_the_plan_counts_what_a_half_done_stage_lacks_and_settings_of_rows(tiny: Tiny) -> None:
    tiny.run("--only", "questions")
    rows = [{"id": "q0", "prompt": "x" * 40, "settings": {"n": 3, "max_tokens": 7}}, {"id": 1, "prompt": "y" * 8}]
    tiny.edit('prompts = "{work}/questions.jsonl"', 'prompts = "recipe/asked.jsonl", n = 2')
    (tiny.recipe.parent / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, _ = tiny.run("--plan")
    # q0: 3 samples of 7 tokens, 10 read each; the other: 2 of 10, 2 read each.
    assert re.search(r"draw \[round 1\] +to do: first time +5 +34 +41 ", out)
    tiny.programs.write_text(tiny.programs.read_text().replace('print(f"{len', 'sys.exit(1)\n    print(f"{len'))
    tiny.run(code=1)
    out, _ = tiny.run("--plan")
    # One sample of q0 is in the file (those of q1, q2, q3 are of no prompt here).
    assert re.search(r"draw \[round 1\] +to do: was begun and not finished +4 +24 +34 ", out)


def test_provenance_says_who_made_what(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_SECRET_KEY", "sk-do-not-tell")
    tiny.edit('model = "first"', 'model = "http://user:hidden@host/first"')
    tiny.run()
    text = (tiny.work / "provenance.json").read_text()
    page = (tiny.work / "provenance.md").read_text()
    records = "".join(path.read_text() for path in (*tiny.work.glob("pipeline/*"), *tiny.work.glob("logs/*")))
    for secret in ("sk-do-not-tell", "hidden"):
        assert secret not in text + page + records
    assert '"http://***@host/first"' in text
    stages = {stage["stage"]: stage for stage in json.loads(text)["stages"]}
    assert list(stages) == [
        "questions",
        *(f"{n}.round{k}" for k in (1, 2) for n in ("draw", "verify", "decide")),
        "pool",
    ]
    draw = stages["draw.round2"]
    files = tiny.files()
    assert draw["turns"] == {"round": 2}
    assert draw["inputs"]["work/questions.jsonl"] == {
        "sha256": files["questions.jsonl"],
        "made_by_stages": ["questions"],
    }
    assert draw["inputs"]["recipe/programs.py"]["made_by_stages"] == []
    output = draw["outputs"]["work/round2/samples.jsonl"]
    assert output["sha256"] == files["round2/samples.jsonl"]
    assert output["made_by"] == [{"model": "good-1", "settings_digest": "s1", "rows": 4}]
    assert re.fullmatch(r"[0-9a-f]{40}", draw["code"]["git"] or "0" * 40)
    assert "torch" in draw["code"]["packages"]
    assert "4 by `good-1`, settings s1" in page and "Every question is answered once." in page


def test_provenance_of_pairs_names_both_sides(tiny: Tiny) -> None:
    teacher, student = {"model": "big", "settings_digest": "t"}, {"model": "small", "settings_digest": "s"}
    rows = [{"id": str(k), "made_by": {"chosen": teacher if k else student, "rejected": student}} for k in range(3)]
    (tiny.recipe.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.recipe.write_text(
        """
        name = "pairs"
        work = "work"
        [[stage]]
        name = "copy"
        command = ["cp", "recipe/pairs.jsonl", "{work}/p.jsonl"]
        inputs = ["recipe/pairs.jsonl"]
        outputs = ["{work}/p.jsonl"]
        """
    )
    tiny.run()
    (stage,) = json.loads((tiny.work / "provenance.json").read_text())["stages"]
    assert stage["outputs"]["work/p.jsonl"]["made_by"] == [
        {"side": "chosen", "model": "big", "settings_digest": "t", "rows": 2},
        {"side": "chosen", "model": "small", "settings_digest": "s", "rows": 1},
        {"side": "rejected", "model": "small", "settings_digest": "s", "rows": 3},
    ]


def test_earlier_turns_from_0_stand_in_a_turn_and_after_the_loop(tiny: Tiny) -> None:
    tiny.recipe.write_text(
        """
        name = "turns"
        work = "work"
        [loops.turn]
        times = 2
        [[stage]]
        name = "begin"
        command = ["sh", "-c", "echo 0 > $0", "{work}/t0"]
        outputs = ["{work}/t0"]
        [[stage]]
        name = "go"
        each = "turn"
        command = ["sh", "-c", "(cat $@; echo {turn}) > $0", "{work}/t{turn}", "{work}/t{each_before_turn}"]
        inputs = ["{work}/t{each_before_turn}"]
        outputs = ["{work}/t{turn}"]
        [[stage]]
        name = "end"
        command = ["sh", "-c", "cat $@ > $0", "{work}/all", "{work}/t{each_before_turn}"]
        inputs = ["{work}/t{each_before_turn}"]
        outputs = ["{work}/all"]
        """
    )
    tiny.run()
    # t1 = t0 + "1"; t2 = t0 + t1 + "2"; all = t0 + t1 + t2
    assert (tiny.work / "all").read_text().split() == ["0", "0", "1", "0", "0", "1", "2"]
