"""The before-and-after table: shares and margins by hand, Wilson's interval, and the command on a model that learnt."""

import json
import math
from pathlib import Path

import pytest
from run_fixtures import OWN_PAIRS, arguments, run_here, torch_settings_kept

from data_tools.tokenizer import load_tokenizer
from eval.preference import compare, main, read_run, table, wilson_interval
from trainer.entry import exit_code
from trainer.errors import RunError
from trainer.score import PairScore


def score(chosen: float, rejected: float, *, tokens: tuple[int, int] = (1, 1)) -> PairScore:
    return PairScore("x", chosen, rejected, [1] * tokens[0], [2] * tokens[1])


def run(*argv: object) -> int:
    with torch_settings_kept():
        return exit_code(main, [str(item) for item in argv])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Wilson (1927) by hand: centre (p + z^2/2n) / (1 + z^2/n), z = 1.96
        (8, 10, 0.490162, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (160, 200, 0.739145, 0.849548),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_solves_its_equation() -> None:
    """Each end p is where (share - p)^2 = z^2 p (1 - p) / n."""
    for end in wilson_interval(37, 50):
        assert (37 / 50 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 50, rel=1e-9)


def test_shares_and_margins_by_hand() -> None:
    before = [score(-10, -12), score(-10, -8), score(-6, -6, tokens=(3, 2)), score(-5, -5)]
    after = [score(-9, -13), score(-9, -8.5), score(-7, -7, tokens=(3, 2)), score(-4, -4)]
    numbers = compare(before, after)
    # gains: (1, -1) right; (1, -0.5) right; (-1, -1) a tie; (1, 1) a tie
    assert numbers["pairs"] == 4 and numbers["reward_accuracy"] == 0.5
    assert (numbers["reward_accuracy_low"], numbers["reward_accuracy_high"]) == wilson_interval(2, 4)
    assert numbers["logratio_margin"] == pytest.approx((2 + 1.5 + 0 + 0) / 4)
    # mean log-prob a token: the third pair has -2 against -3
    assert numbers["policy_share_before"] == 0.5 and numbers["policy_share_after"] == 0.5
    assert numbers["margin_before"] == pytest.approx((2 - 2 + 0 + 0) / 4)
    assert numbers["margin_after"] == pytest.approx((4 - 0.5 + 0 + 0) / 4)
    assert numbers["chosen_logps_before"] == pytest.approx(-31 / 4)
    assert numbers["chosen_logps_after"] == pytest.approx(-29 / 4)


def test_lists_of_different_pairs_are_our_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([score(-1, -2)] * 2, [score(-1, -2)])


def test_the_table_with_and_without_a_run() -> None:
    numbers = compare([score(-10, -12), score(-10, -8)], [score(-9, -13), score(-9, -8.5)])
    lines = table(numbers, [], "runs/x/export").splitlines()
    assert lines[0].split() == ["held-out", "pairs", "2"]
    assert lines[2].split()[:3] == ["reward", "accuracy", "1.000"]
    assert lines[-1].split() == ["model", "runs/x/export"]
    rows = [{"step": n, "perf/pairs_per_s": n / 2, "perf/peak_memory_mib": 100.0 + n % 2} for n in (1, 2, 3)]
    text = table(numbers, rows, "m")
    assert text.splitlines()[-4:-1] == [
        f"{'training steps':<46}{'':>10}  3",
        f"{'training pairs a second (median)':<46}{'':>10}  1.00",
        f"{'peak memory of training, MiB':<46}{'':>10}  101",
    ]


def test_a_run_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="its metrics.jsonl has no row; name the folder of a run that trained"):
        read_run(str(tmp_path))


def test_the_command_sees_what_training_did(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.max_steps=4", "train.epochs=4", "train.global_batch=16", "train.learning_rate=3e-3")
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, *settings)) == 0
    capsys.readouterr()
    argv = ["--before", tiny_model_dir, "--after", tmp_path / "run" / "export", "--data", OWN_PAIRS]
    assert run(*argv, "--run", tmp_path / "run", "--json", tmp_path / "out" / "numbers.json") == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["pairs"] == 16 and numbers["reward_accuracy"] >= 0.75
    assert numbers["logratio_margin"] > 1.0 and numbers["margin_after"] - numbers["margin_before"] == pytest.approx(
        numbers["logratio_margin"], abs=1e-6
    )
    assert f"{numbers['reward_accuracy']:.3f}" in said and f"model{'':>41}{'':>10}  {tmp_path}/run/export" in said
    assert "training steps" in said


def test_a_model_against_itself_is_all_ties(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--before", tiny_model_dir, "--after", tiny_model_dir, "--data", OWN_PAIRS, "--dtype", "bf16"]
    assert run(*argv, "--json", tmp_path / "numbers.json") == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["reward_accuracy"] == 0.0 and numbers["logratio_margin"] == 0.0
    assert numbers["margin_before"] == numbers["margin_after"] and math.isfinite(numbers["margin_before"])
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_special_tokens_in_text_are_read_as_the_run_read_them(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that spells the end of a text: read as a token it has other log-probs than as its letters."""
    token = load_tokenizer(tiny_model_dir).eos_token
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "One?", "chosen": f"yes{token}no", "rejected": "no"}
    pairs.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = []
    for how in ("text", "control"):
        argv = ["--before", tiny_model_dir, "--after", tiny_model_dir, "--data", pairs, "--special-tokens", how]
        assert run(*argv, "--json", tmp_path / "numbers.json") == 0
        found.append(json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["chosen_logps_before"])
    assert abs(found[0] - found[1]) > 1.0
