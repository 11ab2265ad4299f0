"""What `--help` says of every key, and the tables of the config that repeat `trainer.losses`."""

import subprocess
import sys
from pathlib import Path

from trainer import config_sections, losses
from trainer.config import SECTIONS, help_text
from trainer.config_sections import section_hints

ROOT = Path(__file__).parent.parent


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_key_with_default_and_meaning() -> None:
    lines = help_text().splitlines()
    for section, cls in SECTIONS.items():
        for name in section_hints(cls):
            (row,) = [i for i, line in enumerate(lines) if line.startswith(f"  --{section}.{name}  (")]
            assert "default " in lines[row] or "required" in lines[row]
            assert len(lines[row + 1].strip()) > 10, f"{section}.{name} has no documentation"
    assert "  --loss.beta  (a finite number; default 0.1)" in lines


def test_help_exits_0_and_needs_no_torch() -> None:
    program = "import sys; from trainer.config import load_config\ntry: load_config(['--help'])\n"
    program += "except SystemExit as done: print(done.code, sorted({'torch', 'numpy'} & set(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "0 []"
    assert output.startswith("usage: torchrun trainer/main.py CONFIG.toml")


# --- the tables that repeat trainer.losses ---------------------------------------------------------------------------


def test_loss_tables_are_those_of_the_losses() -> None:
    assert set(config_sections.LOSS_TYPES) == set(losses.DPO_LOSSES)
    assert config_sections.CPO_LOSS_TYPES == losses.CPO_LOSSES
    assert set(config_sections.F_DIVERGENCE_LOSS_TYPES) == losses.F_DIVERGENCE_LOSSES
    smoothed = {name for name, options in losses.LOSS_OPTIONS.items() if "label_smoothing" in options}
    assert set(config_sections.SMOOTHED_LOSS_TYPES) == smoothed
