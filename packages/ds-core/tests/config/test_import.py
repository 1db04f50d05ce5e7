"""What importing and using ds_core.config loads."""

from __future__ import annotations

import subprocess
import sys


def test_no_torch() -> None:
    program = (
        "import sys; from ds_core.config import *; from ds_core.config import find_problems\n"
        "load_config({'train_batch_size': 2, 'checkpoint': {'sharded': {}}, 'torch_autocast': {'dtype': 'half'}})\n"
        "DeepSpeedConfig({'train_batch_size': 2}); find_problems({'zork': 1})\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('torch', 'numpy', 'hjson')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
