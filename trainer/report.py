"""A run's margins, rewards and accuracy as a picture: `python -m trainer.report --run DIR --png FILE`.

Needs matplotlib (`pip install logratio[plots]`).
"""

import argparse
import sys
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import RunError, UserError
from trainer.metrics import read_metrics

PANELS = (
    ("margin chosen - rejected (rewards)", ("rewards/margins",)),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("reward accuracy", ("rewards/accuracies",)),
    ("step accuracy", ("step_accuracy", "step_accuracy_right", "step_accuracy_wrong")),
    ("AUC of steps", ("step_auc",)),
    ("loss", ("loss",)),
)
"""Title and metrics of each panel; the `eval_` metric of the same name is drawn as dots."""


def draw(run: str, png: str) -> None:
    """Write the picture of the run folder `run`. Raises UserError without matplotlib, RunError without rows."""
    try:
        from matplotlib.figure import Figure  # optional: only this command draws
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'logratio[plots]'") from None
    rows = read_metrics(run)
    panels = [(title, names) for title, names in PANELS if any(name in row for row in rows for name in names)]
    if not panels:
        raise RunError(run, "has no row of metrics to draw yet; train at least one step")
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            (line,) = axis.plot(*_points(rows, name), label=name.removeprefix("rewards/"))
            axis.plot(*_points(rows, f"eval_{name}"), "o", color=line.get_color(), markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    try:
        figure.savefig(png, dpi=110)
    except OSError as error:
        raise RunError(png, f"cannot be written ({error.strerror}); give another --png") from None


def _points(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    kept = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="run folder (or its metrics.jsonl)")
    parser.add_argument("--png", required=True, help="picture to write")
    args = parser.parse_args(argv)
    draw(args.run, args.png)
    print(f"picture: {Path(args.png)}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
