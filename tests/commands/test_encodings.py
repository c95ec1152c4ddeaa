"""Every command where stdout and stderr cannot show every character: what they lack is replaced, and nothing raises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from popup_surgery import build, convert, save
from support import PATIENCE, slow_except

ENCODINGS = {"ascii": "ascii", "latin-1": "latin-1", "ascii:strict": "ascii", "cp437": "cp437"}
ALL = """
import logging, sys
from popup_surgery.commands import main
for call in {calls!r}:
    sys.argv = ["popup-surgery", *call]
    logging.getLogger("popup_surgery").warning("× √ ☃ %s", call[0])
    print("status", main())
"""
FILE = "nö☃.popup.safetensors"
CALLS = [
    ["--help"], ["--nö☃"], ["nö☃"], ["convert", "--help"], ["sweep", "--help"], ["inspect", FILE], ["verify", FILE],
    ["diff", FILE, FILE], ["export", FILE, "-o", "dense☃.safetensors"], ["predict", FILE, "nö☃.png"],
    ["evaluate", FILE, "--set", "data.name=☃"], ["sanity", FILE, "-o", "☃.txt"], ["recipes", "digits"],
    ["recipes", "☃"], ["convert", "conv2", "--dry-run"], ["convert", "☃"], ["zoo", "☃"], ["sweep", "☃"],
    ["train", "digits", "--set", "training.lr=☃"], ["reproduce", "☃"],
    ["train", "mine☃.yaml", "--set", "training.epochs=1", "--set", "data.max_train=64", "-o", "run☃"],
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    model = convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5)
    save(model, folder / FILE)
    save_file(build("conv2").state_dict(), folder / "w.safetensors")
    text = (Path(__file__).parents[2] / "recipes" / "digits.yaml").read_text()
    (folder / "mine☃.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("encoding", slow_except(ENCODINGS, []))
def test_what_the_output_cannot_show_is_replaced(encoding: str, work: Path, tmp_path: Path) -> None:
    calls = [["run" + encoding.replace(":", "") if word == "run☃" else word for word in call] for call in CALLS]
    calls = [[word.replace("dense☃", f"dense☃{encoding}".replace(":", "")) for word in call] for call in calls]
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ALL.format(calls=calls)], cwd=work, env=env, capture_output=True, timeout=PATIENCE
    )
    out, err = (text.decode(ENCODINGS[encoding]) for text in (done.stdout, done.stderr))
    assert done.returncode == 0, err
    assert "Traceback" not in err
    assert "Logging error" not in err
    statuses = re.findall(r"^status (\d+)$", out, re.M)
    assert len(statuses) == len(CALLS)
    assert set(statuses) == {"0", "2"}
    assert "16 ? 1 ? 3 ? 3" in out if "ascii" in encoding else "\u00d7" in out or "?" in out
    assert len(re.findall(r"^\S \S \? ", err, re.M)) == len(CALLS) - 1  # before the first, the streams are as they were
