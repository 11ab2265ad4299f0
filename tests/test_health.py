"""Warnings during training: each named once, none in a healthy run, with remedies that fit the objective."""

import pytest

from trainer.health import WINDOW, Health

HEALTHY = {
    "step": 1,
    "loss": 0.5,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.2,
    "rewards/accuracies": 0.8,
    "rewards/margins": 0.3,
    "logps/chosen": -100.0,
    "logps/rejected": -90.0,
    "lengths/chosen": 50.0,
    "lengths/rejected": 45.0,
}


def warnings(health: Health, steps: int, **changes: float) -> list[str]:
    """What is said over so many equal rows; keys are written with _ for /."""
    row = HEALTHY | {name.replace("_", "/"): value for name, value in changes.items()}
    return [text for _ in range(steps) for text in health.check(row)]


@pytest.mark.parametrize("beta", [0.1, None])
def test_a_healthy_run_is_left_in_peace(beta: float | None) -> None:
    assert warnings(Health(beta), 5 * WINDOW) == []


def test_sft_has_no_pairs_to_warn_about() -> None:
    health = Health()
    rows = [{"step": step, "loss": 0.001, "nll_loss": 0.001} for step in range(3 * WINDOW)]
    assert [text for row in rows for text in health.check(row)] == []


def test_falling_below_the_reference_is_measured_against_it() -> None:
    # -0.1 * 50 tokens * 0.1 nats = -0.5 is the limit of the chosen reward
    assert warnings(Health(beta=0.1), 2 * WINDOW, rewards_chosen=-0.49) == []
    (text,) = warnings(Health(beta=0.1), 2 * WINDOW, rewards_chosen=-0.6)
    assert text.startswith("the chosen answers are 0.12 nats a token less likely than with the reference")
    assert "add sft to loss.loss_type" in text
    # data that is simply less likely is no fall
    health = Health(beta=0.1)
    assert warnings(health, WINDOW) + warnings(health, WINDOW, logps_chosen=-400.0) == []


def test_falling_without_a_reference_is_measured_against_the_first_steps() -> None:
    health = Health()
    assert warnings(health, WINDOW) == []
    assert warnings(health, WINDOW, logps_chosen=-104.0) == []  # 0.08 nats a token
    (text,) = warnings(health, WINDOW, logps_chosen=-110.0)
    assert text.startswith("the chosen answers are 0.1") and "than with the first steps" in text
    assert "loss.loss_type" not in text and "train.learning_rate" in text


@pytest.mark.parametrize(
    ("loss", "accuracy", "expected"), [(0.01, 1.0, 1), (0.03, 1.0, 0), (0.01, 0.98, 0), (0.0, 0.995, 1)]
)
def test_saturation_needs_accuracy_and_a_loss_near_zero(loss: float, accuracy: float, expected: int) -> None:
    found = warnings(Health(0.1), WINDOW, loss=loss, rewards_accuracies=accuracy)
    assert len(found) == expected
    assert all(
        text.startswith(f"reward accuracy {accuracy:.2f} at loss {loss:.4f}: the pairs are solved") for text in found
    )


@pytest.mark.parametrize(("chosen", "rejected", "word"), [(80.0, 50.0, "longer"), (40.0, 61.0, "shorter")])
def test_lengths_far_apart(chosen: float, rejected: float, word: str) -> None:
    (text,) = warnings(Health(0.1), WINDOW, lengths_chosen=chosen, lengths_rejected=rejected)
    assert text.startswith(f"chosen answers are {abs(chosen - rejected):.0f} tokens {word} than rejected")
    assert text.endswith("loss.ld_alpha")
    (text,) = warnings(Health(None), WINDOW, lengths_chosen=chosen, lengths_rejected=rejected)
    assert text.endswith("may learn that alone")
    assert warnings(Health(0.1), WINDOW, lengths_chosen=60.0, lengths_rejected=41.0) == []


def test_each_is_named_once_and_not_before_a_window_of_steps() -> None:
    health = Health(0.1)
    bad = {"loss": 0.0, "rewards_accuracies": 1.0, "rewards_chosen": -50.0, "lengths_rejected": 5.0}
    assert warnings(health, WINDOW - 1, **bad) == []
    assert len(warnings(health, 1, **bad)) == 3
    assert warnings(health, 3 * WINDOW, **bad) == []
    assert warnings(health, WINDOW) + warnings(health, WINDOW, **bad) == []


def test_one_bad_step_is_no_trend() -> None:
    health = Health(0.1)
    assert warnings(health, WINDOW) + warnings(health, 1, rewards_chosen=-5.0) + warnings(health, WINDOW) == []


def test_the_progress_bar_shows_what_a_row_has() -> None:
    assert Health().shown(HEALTHY) == ["loss", "rewards/accuracies", "rewards/margins"]
    assert Health().shown({"loss": 1.0, "nll_loss": 1.0}) == ["loss"]
