"""Robustness: runs that are killed at random moments, and every other fault that the tests cause.

    python benchmarks/faults.py [--kills 20] [--seed 0] [--output benchmarks/results/faults.json]

Half of the kills fall at a random moment of the training. The other half fall while a checkpoint is being written, as a
half-written file shows; a checkpoint is saved after each step. The run then resumes with --resume and must end in the
same file as a run that was not killed. The other faults are the tests marked `fault`: full and read-only disks, damaged
and lost files, dead processes, a clock that runs backwards, an edited recipe, a second run in the folder.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ["training.epochs=3", "training.checkpoint_minutes=0.0001"]


def command(folder: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(folder), "--resume", *sets]


def artifact(folder: Path) -> bytes:
    return (folder / "digits.popup.safetensors").read_bytes()


def kill(folder: Path, within_a_write: bool, moment: random.Random) -> tuple[bool, bool]:
    """Start a run and kill it. Returns whether it was still alive, and whether a checkpoint was half written."""
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = folder / "checkpoints"
    while not list(checkpoints.glob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(moment.uniform(0, 1.0))
    while within_a_write and not list(checkpoints.glob(".*.part")) and process.poll() is None:
        pass
    process.kill()
    return process.wait() == -signal.SIGKILL, bool(list(checkpoints.glob(".*.part")))


def others() -> dict[str, int]:
    """Run the tests marked `fault`. Returns how many passed, failed and were skipped."""
    call = [sys.executable, "-m", "pytest", "-q", "-m", "fault", "-p", "no:cacheprovider", "tests"]
    said = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parent.parent).stdout
    print(said.strip().splitlines()[-1])
    return {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", said.splitlines()[-1])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=Path, default=Path("faults.json"))
    arguments = parser.parse_args()
    moment = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        through = Path(temporary) / "through"
        subprocess.run(command(through), check=True, capture_output=True)
        killed = survived = same = within = 0
        for number in range(arguments.kills):
            folder = Path(temporary) / str(number)
            alive, half = kill(folder, number % 2 == 1, moment)
            killed, within = killed + alive, within + half
            done = subprocess.run(command(folder), capture_output=True, text=True)
            survived += done.returncode == 0
            same += done.returncode == 0 and artifact(folder) == artifact(through)
            left = " ".join(done.stderr.split())
            print(
                f"kill {number + 1}: status {done.returncode}, {same} of {number + 1} the same file {left}", flush=True
            )
    print(f"same file: {same} of {arguments.kills}, {within} of {killed} kills within the writing of a checkpoint")
    result = {"kills": killed, "within_a_write": within, "survived": survived, "same_file": same, "others": others()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
