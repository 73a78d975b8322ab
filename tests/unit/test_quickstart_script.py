"""The commands of tools/quickstart.sh, with stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = '#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORD"\n'
EVALUATED = RECORD + 'if [ "$1" = evaluate ]; then mkdir -p "$2/evaluation"; fi\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the script with an install.sh that installs nothing."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/quickstart.sh", tmp_path / "tools")
    (tmp_path / "tools/install.sh").write_text(f'export PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "bin").mkdir()
    for name, text in (("deepspeed", RECORD), ("medalign", EVALUATED), ("nvidia-smi", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(checkout: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("ARMS", "SEED", "STEPS", "RANKS")}
    environment |= {"RECORD": str(checkout / "record")} | settings
    command = ["bash", str(checkout / "tools/quickstart.sh"), "out"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def trainings(checkout: Path) -> dict[str, str]:
    """Return arm -> its own words, without those that all arms share."""
    lines = [line for line in (checkout / "record").read_text().splitlines() if line.startswith("deepspeed")]
    runs = [line.split("--run.dir out/")[1].split() for line in lines]
    return {words[0]: " ".join(words[words.index("cpu") + 1 :]) for words in runs}


def test_each_arm_differs_from_medalign_in_one_setting(checkout: Path) -> None:
    assert start(checkout, ARMS="base language steered untrained medalign").returncode == 0
    assert trainings(checkout) == {
        "base": "--train.steps 0",
        "language": "--losses.alpha 0 --losses.beta 0 --student.steering false",
        "steered": "--losses.alpha 0 --losses.beta 0",
        "untrained": "--teacher.random_weights_seed 1",
        "medalign": "",
    }
    report = (checkout / "record").read_text().splitlines()[-1]
    assert report == (
        "medalign report out/base out/language out/steered out/untrained out/medalign --output out/report.html"
    )


def test_three_arms_by_default(checkout: Path) -> None:
    assert start(checkout).returncode == 0
    assert list(trainings(checkout)) == ["base", "language", "medalign"]


def test_a_later_arm_is_added_to_the_report_of_earlier_ones(checkout: Path) -> None:
    assert start(checkout).returncode == start(checkout, ARMS="steered").returncode == 0
    lines = (checkout / "record").read_text().splitlines()
    assert sum(line.startswith("deepspeed") for line in lines) == 4
    assert "out/base out/language out/steered out/medalign" in lines[-1]


def test_an_unknown_arm_is_refused(checkout: Path) -> None:
    done = start(checkout, ARMS="steerd")
    assert done.returncode == 2
    assert "unknown arm steerd: choose from base language steered untrained medalign" in done.stderr
