"""What is wrong with a recipe is said before anything runs: one line with the file, the place and the remedy."""

from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.pipeline import main
from data_tools.pipeline_recipe import read_recipe
from data_tools.pipeline_stages import check, plain_text

PUBLISHED = "questions with id and gold, published at example.org"
WHOLE = """
name = "r"
work = "w/{seed}"
[settings]
seed = 1
rate = 0.5
data = ""
on = true
extra = ["a"]
[required]
data = "questions with id and gold, published at example.org"
[loops.round]
times = 2
stop_when = "{work}/s{round}"
[[stage]]
name = "first"
command = ["x", "{data}", "{work}/a"]
inputs = ["{data}"]
outputs = ["{work}/a"]
[[stage]]
name = "second"
each = "round"
command = ["x", "{work}/a", "{extra}", "{work}/b{round}"]
inputs = ["{work}/a"]
outputs = ["{work}/b{round}", "{work}/s{round}"]
[[stage]]
name = "third"
command = ["x", "--in={work}/b{last_round}", "{work}/c"]
inputs = ["{work}/b{last_round}"]
outputs = ["{work}/c"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path


def fault(text: str, *sets: str) -> str:
    Path("r.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        check(read_recipe("r.toml", ["data=data.jsonl", *sets]))
    return str(caught.value)


def test_a_whole_recipe_and_its_settings(folder: Path) -> None:
    Path("r.toml").write_text(WHOLE)
    recipe = read_recipe("r.toml", ["data=data.jsonl", "seed=7", "rate=2", "on=false", 'extra=["p", "q r"]'])
    assert recipe.settings == {"seed": 7, "rate": 2.0, "data": "data.jsonl", "on": False, "extra": ["p", "q r"]}
    assert recipe.work == Path("w/7")
    steps = check(recipe)
    assert [step.key for step in steps] == ["first", "second.round1", "second.round2", "third"]
    assert steps[2].command == ("x", "w/7/a", "p", "q r", "w/7/b2")
    assert steps[3].inputs == ("w/7/b2",)
    assert read_recipe("r.toml", ["data=data.jsonl", "work=elsewhere"]).work == Path("elsewhere")
    Path("r.toml").write_text(WHOLE.replace('work = "w/{seed}"', ""))
    assert read_recipe("r.toml", ["data=data.jsonl"]).work == Path("runs/recipes/r")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "r"', "", "r.toml: 'name' is missing"),
        ('name = "r"', 'name = "r/s"', "r.toml: 'name': 'r/s' has other characters than letters, digits, _ and -"),
        ('name = "r"', 'name = "r"\nsetting = 1', "r.toml: 'setting' is not known (did you mean 'settings'?); known: "),
        ("inputs =", "input =", "r.toml: stage 'first': 'input' is not known (did you mean 'inputs'?); known: name, "),
        (
            'each = "round"',
            "each = 'rund'",
            "r.toml: stage 'second': each: there is no [loops.rund] (did you mean 'round'?)",
        ),
        ("times = 2", "time = 2", "r.toml: [loops.round]: 'time' is not known (did you mean 'times'?); known: times, "),
        ("times = 2", "times = -2", "r.toml: [loops.round]: 'times': expected a whole number or a placeholder, got -2"),
        ("times = 2", 'times = "{rate}"', "r.toml: [loops.round]: times: expected a whole number, got '0.5'"),
        ('"{work}/s{round}"\n[[', '"{work}/s"\n[[', "r.toml: [loops.round]: 'stop_when' must hold {round}: "),
        (
            '"{work}/s{round}"\n[[',
            '"{work}/t{round}"\n[[',
            "r.toml: [loops.round]: stop_when: no stage of the loop makes w/1/t1; ",
        ),
        ("seed = 1", "seed = 1\nwork = 2", "r.toml: [settings]: {work} is Logratio's own; take another name"),
        (
            "seed = 1",
            "seed = 1\nlast_round = 2",
            "r.toml: [settings]: {last_round} is of [loops.round]; take another name",
        ),
        (
            "seed = 1",
            "seed = 1\nx = 1979-05-27",
            "r.toml: [settings]: 'x': expected a text, a number, true, false or a ",
        ),
        (
            "[required]",
            "[required]\nnone = 'x'",
            "r.toml: [required]: 'none' is no setting; known: data, extra, on, rate, seed",
        ),
        ('"{extra}"', '"-{extra}"', "r.toml: stage 'second': command: '-{extra}': the list {extra} must stand alone"),
        (
            '"{extra}"',
            '"{extr}"',
            "r.toml: stage 'second': command: '{extr}': {extr} has no value here (did you mean 'extra'?); ",
        ),
        (
            "{work}/b{last_round}",
            "{work}/b{round}",
            "r.toml: stage 'third': command: '--in={work}/b{round}': {round} has no value",
        ),
        ('outputs = ["{work}/c"]', "outputs = []", "r.toml: stage 'third': 'outputs' is missing"),
        (
            'outputs = ["{work}/c"]',
            'outputs = ["c"]',
            "r.toml: stage 'third': output c: lies outside the work folder; begin ",
        ),
        (
            'outputs = ["{work}/c"]',
            'outputs = ["{work}/../c"]',
            "r.toml: stage 'third': output w/c: lies outside the work ",
        ),
        (
            'outputs = ["{work}/c"]',
            'outputs = ["{work}/logs/c"]',
            "r.toml: stage 'third': output w/1/logs/c: this name is the",
        ),
        (
            'outputs = ["{work}/c"]',
            'outputs = ["{work}/a"]',
            "r.toml: stage 'third': output w/1/a: is made by stage 'first' too",
        ),
        (
            'outputs = ["{work}/c"]',
            'outputs = ["{work}/a/x"]',
            "r.toml: stage 'third': output w/1/a/x: is made by stage 'first'",
        ),
        (
            'outputs = ["{work}/b{round}",',
            'outputs = ["{work}/b",',
            "output w/1/b: is also that of 'second.round1'; put {round} into",
        ),
        (
            'inputs = ["{data}"]',
            'inputs = ["{work}/c"]',
            "input w/1/c: is made by stage 'third', which does not come before",
        ),
        ('inputs = ["{data}"]', 'inputs = ["{work}/x"]', "r.toml: stage 'first': input w/1/x: no stage makes it"),
        ('inputs = ["{data}"]', 'inputs = ["x.jsonl"]', "r.toml: stage 'first': input x.jsonl: no such file or folder"),
        (
            'inputs = ["{work}/a"]',
            "",
            "stage 'second.round1': the command names w/1/a of stage 'first', which is no input; add",
        ),
        (
            'inputs = ["{work}/b{last_round}"]',
            "",
            "stage 'third': the command names w/1/b2 of stage 'second.round2', which",
        ),
        ('name = "third"', 'name = "first"', "r.toml: stage 'first': another stage has this name"),
        (
            'name = "third"',
            'name = "third"\neach = "round"',
            "r.toml: stage 'third': command: '--in={work}/b{last_round}'",
        ),
        (
            'name = "third"',
            'name = "third"\nwhen = "no"',
            "r.toml: stage 'third': 'when': 'no' is no setting (did you mean 'on'?)",
        ),
        ('name = "third"', 'name = "third"\ncalls = {n = 1}', "r.toml: stage 'third': calls: 'prompts' is missing"),
        (
            'name = "third"',
            'name = "third"\ncalls = {prompts = "p"}',
            "r.toml: stage 'third': calls: prompts p: no stage makes it",
        ),
        ('name = "third"', 'name = "third"\nappends = 1', "r.toml: stage 'third': 'appends': expected true or false"),
        ('name = "first"', 'name = "first"\neach = "round"', "r.toml: "),
        ("[settings]", "[settings", "r.toml: is no TOML: "),
    ],
)
def test_faults_are_named(old: str, new: str, said: str, folder: Path) -> None:
    assert WHOLE.count(old) >= 1
    message = fault(WHOLE.replace(old, new, 1))
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["sed=2"], "--set sed: no such setting (did you mean 'seed'?); known: work, seed, rate, data, on, extra"),
        (["seed=two"], "--set seed=two: expected a whole number, as in the recipe (1)"),
        (["seed=2.5"], "--set seed=2.5: expected a whole number, as in the recipe (1)"),
        (["seed=true"], "--set seed=true: expected a whole number, as in the recipe (1)"),
        (["on=1"], "--set on=1: expected true or false, as in the recipe (True)"),
        (["extra=a"], """--set extra=a: expected ["a", "b"], as in the recipe (['a'])"""),
        (["extra=[1]"], """--set extra=[1]: expected ["a", "b"], as in the recipe (['a'])"""),
        (["seed"], "--set seed: expected key=value"),
        (["data="], f"r.toml: setting 'data' is empty: {PUBLISHED}; give it by --set data=..."),
        (
            ["data=no.jsonl"],
            f"r.toml: stage 'first': input no.jsonl: no such file or folder; setting 'data': {PUBLISHED}",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(sets: list[str], said: str, folder: Path) -> None:
    assert fault(WHOLE, *sets) == said


def test_stages_of_a_loop_stand_together(folder: Path) -> None:
    late = '[[stage]]\nname = "late"\neach = "round"\ncommand = ["x"]\noutputs = ["{work}/l{round}"]\n'
    assert fault(WHOLE + late) == "r.toml: stage 'late': the stages of loop 'round' do not stand together"


def test_a_file_of_the_recipe_that_a_command_names_is_an_input(folder: Path) -> None:
    Path("r").mkdir()
    Path("r/prompts.toml").write_text("")
    Path("r/r.toml").write_text(WHOLE.replace('"--in=', '"{recipe}/prompts.toml", "--in='))
    with pytest.raises(UserError, match="names r/prompts.toml of the recipe, which is no input; add it to inputs"):
        check(read_recipe("r/r.toml", ["data=data.jsonl"]))


def test_a_missing_recipe_and_a_fault_end_the_command_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none.toml"]) == 2
    assert capsys.readouterr().err == "error: none.toml: cannot be read: No such file or directory\n"
    Path("r.toml").write_text(WHOLE)
    assert main(["r.toml", "--plan"]) == 2
    assert "published at example.org" in capsys.readouterr().err
    assert not Path("w").exists()


def test_paths_that_say_only_where_things_stand_are_no_part_of_a_command(folder: Path) -> None:
    Path("r").mkdir()
    Path("r/r.toml").write_text(WHOLE)
    recipe = read_recipe("r/r.toml", ["data=data.jsonl", "work=w"])
    for text, plain in (
        ("w/a", "{work}/a"),
        ("--out=w", "--out={work}"),
        ("ww/w", "ww/w"),
        ("raw", "raw"),
        ("r/p", "{recipe}/p"),
    ):
        assert plain_text(text, recipe) == plain


def test_a_recipe_with_the_stages_of_another(folder: Path) -> None:
    Path("base.toml").write_text(WHOLE)
    own = 'extends = "base.toml"\nname = "small"\n[settings]\nseed = 7\n[required]\ndata = "rows"\n'
    Path("small.toml").write_text(own)
    recipe = read_recipe("small.toml", ["data=data.jsonl"])
    base = read_recipe("base.toml", ["data=data.jsonl"])
    assert (recipe.name, str(recipe.work), recipe.settings["seed"], recipe.settings["rate"]) == ("small", "w/7", 7, 0.5)
    assert recipe.block == base.block and recipe.required == {"data": "rows"}
    for text, problem in (
        (own.replace("base.toml", "../base.toml"), "expected the name of a recipe in the same folder"),
        (own.replace("seed = 7", "sed = 7"), "'sed' is no setting of base.toml"),
        (own.replace("seed = 7", 'seed = "7"'), "'seed' is of another kind than in base.toml"),
        (own + "[loops.round]\ntimes = 1\n", "'loops' stands in base.toml, which this recipe extends"),
        (own.replace("base.toml", "small.toml"), "extends another one itself"),
    ):
        Path("small.toml").write_text(text)
        with pytest.raises(UserError, match="small.toml: ") as caught:
            read_recipe("small.toml", ["data=data.jsonl"])
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("key", "sets", "takes_part"),
    [
        ("when", (), True),
        ("when", ("on=false",), False),
        ("when", ("seed=0",), False),
        ("unless", (), False),
        ("unless", ("on=false",), False),
        ("unless", ("on=false", "seed=0"), True),
    ],
)
def test_a_stage_may_depend_on_several_settings(
    key: str, sets: tuple[str, ...], takes_part: bool, folder: Path
) -> None:
    Path("r.toml").write_text(WHOLE.replace('name = "third"', f'name = "third"\n{key} = ["on", "seed"]'))
    steps = check(read_recipe("r.toml", ["data=data.jsonl", *sets]))
    assert ("third" in {step.stage.name for step in steps}) == takes_part
