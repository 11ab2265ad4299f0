"""Train from preference pairs: `torchrun trainer/main.py CONFIG.toml [--section.key=value ...]`.

Exit codes: 0 done, 2 something the user can mend (one line says what), 1 anything else.
"""

import sys
from pathlib import Path

# This checkout comes first on sys.path, in place of the script's own folder: Hugging Face publishes a package that is
# also called `kernels`, and trainer/config.py must not shadow a top-level `config`.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [
    str(ROOT),
    *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "trainer")),
]

from trainer.entry import run_command  # noqa: E402
from trainer.train import main  # noqa: E402

if __name__ == "__main__":
    run_command(main, sys.argv[1:])
