"""The decoder in C, compiled with sanitizers, and what it makes of a file."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from support import ROOT

NATIVE = ROOT / "native"
COMPILER = shutil.which(os.environ.get("CC", "cc"))
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
STRICT += ["-Wno-missing-field-initializers", "-Wno-unknown-pragmas"]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder: Path, *flags: str) -> Path:
    """Compile `popup-unpack` and return where it is."""
    assert COMPILER is not None
    program = folder / "popup-unpack"
    sources = [str(NATIVE / "unpack.c"), str(NATIVE / "popup.c")]
    command = [COMPILER, *STRICT, *flags, "-ffp-contract=off", *sources, "-lm", "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    return program


@dataclass(frozen=True)
class Unpack:
    """The program. Its status 0 is success, 1 to 7 are the errors of popup.h; all else is a fault of its own."""

    program: Path
    folder: Path

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(self.program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        assert 0 <= done.returncode <= 7, done.stderr
        assert (done.returncode == 0) == (done.stderr == ""), done.stderr
        return done

    def state(self, path: Path, *form: str) -> dict[str, Tensor]:
        """The tensors that it gives."""
        out = self.folder / "out.safetensors"
        done = self.run(path, out, *form)
        assert done.returncode == 0, done.stderr
        return load(out.read_bytes())  # a mapped file would change with the next one

    def refusal(self, data: bytes) -> str:
        """What it says of a file that it must not read; empty if it reads it."""
        path = self.folder / "file"
        path.write_bytes(data)
        return self.run(path).stderr.removeprefix(f"{path}: ").removesuffix("\n")
