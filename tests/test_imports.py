"""Imports run one way: the arrows are in pyproject.toml."""
import subprocess
import sys
from pathlib import Path


def test_imports_run_one_way():
    # In a process of its own: it configures logging, which closes the streams that other handlers of this one write to.
    result = subprocess.run([Path(sys.executable).with_name('lint-imports'), '--no-cache'], capture_output=True,
                            text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stdout + result.stderr
