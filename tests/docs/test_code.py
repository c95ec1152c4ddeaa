"""The documentation's Python runs, its command lines parse, and run unless they need somebody's data or time."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
from safetensors.torch import save_file
from typer.main import get_command

import popup_surgery
from hub_server import Hub
from popup_surgery.commands import app
from support import ROOT, slow_except, write_digit

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

READER = "docs/artifact-format.md"  # test_docs.py runs it
BEFORE = {  # what a page takes for granted; its code registers things, so that it runs in a process of its own
    "docs/extending.md": "from popup_surgery.learners import EdgePopup as Mine, register_learner\n"
    "from popup_surgery.weights import Scheme, register_scheme\n",
}

# of the command lines: what stands for a user's own, and what has it here
AB = {"A": "digits.popup.safetensors", "B": "other.popup.safetensors"}
STANDS_FOR = {
    "FILE": "digits.popup.safetensors",
    "IMAGE…": "digit.png",
    "DENSE": "dense.safetensors",
    "ARCH": "conv2",
    "FOLDER": "tasks",
    "BOTH": "both.popup.safetensors",
    "SMALL": "small.popup.safetensors",
    **AB,
}
OF_A_USER = re.compile(r"\bDIR\b|\bRECIPE\b|\bOUT/|\bmy\.yaml|--on ray|--num-processes")
FC = "--set 'model={name: popup_surgery/fc_bn, kwargs: {in_chans: 1, img_size: 8}}'"
LONG = {  # more than 10 seconds; tests run something shorter, or the same elsewhere
    "train digits": "the fixture `digits_run` is this run",
    "sweep digits --set 'surgery.k=[0.3, 0.5]' --seeds 5": "10 runs; the help's example has 4 short ones",
    "sweep digits --set 'surgery.k=[0.3, 0.5]' --set training.epochs=3 --seeds 5": "10 runs",
    f"train digits {FC} -o tasks/upright": "the fixture `tasks` is this run, with fewer epochs",
    f"train digits {FC} --set data.permute_seed=1 -o tasks/permuted": "the same",
    "sweep many_tasks/permuted_digits": "tests/sweep has it with fewer tasks and epochs",
    "sweep many_tasks/piggyback_digits": "the same",
    "convert resnet101": "44 million weights are drawn and checked",
    "bench FILE": "tests/experiment/test_bench.py has it with fewer rounds",
    "bench runs/digits/digits.popup.safetensors --threads 1 -o bench.png": "the same",
    "zoo timm": "every network of timm",
}
SLOW = {"evaluate", "export", "predict", "push", "sanity", "sweep", "train"}  # each has an example in its help too
SWEEP = "recipe: digits\nset: {training.epochs: 1}\ngrid: {surgery.k: [0.5]}\nseeds: 1\n"


class Line(NamedTuple):
    """A command line on a page, without the program's name, and the output that the page shows below it."""

    page: str
    text: str
    output: str


def python_blocks(page: str) -> list[str]:
    return [code for language, code in FENCE.findall((ROOT / page).read_text()) if language == "python"]


def command_lines(page: str) -> list[Line]:
    """The command lines of a page: in fences, in indented blocks, and as code in the text."""
    text = (ROOT / page).read_text()
    found = []
    for language, code in FENCE.findall(text):
        if language == "console":  # each call with its output
            calls = re.split(r"^\$ ", code, flags=re.M)[1:]
            found += [(call, output) for call, _, output in (part.partition("\n") for part in calls)]
        elif language == "bash":
            found += [(line, "") for line in code.splitlines()]
    text = FENCE.sub("", text)
    indented = "\n".join(re.findall(r"^    .*", text, re.M)).replace("\\\n", " ")
    found += [(line, "") for line in indented.splitlines()]
    found += [(span, "") for span in re.findall(r"`(popup-surgery [^`]+)`", text)]
    lines = []
    for call, output in found:
        if match := re.search(r"(?:(?:^|\s|/)popup-surgery|-m popup_surgery) +(\w.*)", call):
            lines.append(Line(page, re.sub(r"\s+# .*", "", match[1]).strip(), output))
    return lines


LINES = list({(line.text, line.output): line for page in PAGES for line in command_lines(page)}.values())


def to_run(line: Line) -> bool:
    alone = " " not in line.text  # a command that is mentioned, rather than a call
    return not alone and not OF_A_USER.search(line.text) and line.text not in LONG


def blurred(text: str) -> str:
    """Text without numbers, commits and spaces: a figure may differ from one machine to the next, a word may not."""
    text = re.sub(r"\b[0-9a-f]{40}\b", "#", text)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", text)).strip()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs of the tutorial on many tasks, shortened."""
    folder = tmp_path_factory.mktemp("tasks")
    network = shlex.split(FC)[1:]
    for name, permuted in {"upright": [], "permuted": ["data.permute_seed=1"]}.items():
        overrides = [*network, *permuted, "training.epochs=4"]
        popup_surgery.train("digits", overrides=overrides, output=folder / name)
    return folder


@pytest.fixture(scope="module")
def a_hub() -> Iterator[Hub]:
    """A Hub of this module."""
    with Hub() as running:
        yield running


@pytest.fixture
def work(
    digits_run: popup_surgery.Result, tasks: Path, a_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory as a reader has it: runs, their files, a picture of a 4, a file on the Hub."""
    monkeypatch.chdir(tmp_path)
    a_hub.here(monkeypatch, tmp_path / "hub", token="hf_me")
    a_hub.add("me/digits", {"digits.popup.safetensors": digits_run.file.read_bytes()})
    shutil.copytree(tasks, "tasks")
    shutil.copytree(digits_run.output, "runs/digits")
    shutil.copy(digits_run.file, "digits.popup.safetensors")
    write_digit(Path("digit.png"), 4)
    shutil.copy("digits.popup.safetensors", "other.popup.safetensors")
    return tmp_path


WITH_PYTHON = [page for page in PAGES if python_blocks(page) and page != READER]


@pytest.mark.parametrize("page", slow_except(WITH_PYTHON, ["docs/index.md", "docs/surgery.md"]))
def test_the_python_of_a_page_runs(page: str, work: Path) -> None:
    Path("mine.yaml").write_text(SWEEP)
    Path("data").mkdir()
    code = "\n".join(python_blocks(page))
    if "pretrained=True" in code:  # which would be fetched
        save_file(timm.create_model("resnet18").state_dict(), "weights.safetensors")
        code = code.replace("pretrained=True", 'pretrained="weights.safetensors"')
    if page in BEFORE:
        subprocess.run([sys.executable, "-W", "error", "-c", BEFORE[page] + code], check=True, timeout=100)
    else:
        exec(compile(code, page, "exec"), {"__name__": page})


def test_no_python_stands_in_an_indented_block() -> None:
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text()) if page != READER else ""  # which has pseudocode
        assert not re.findall(r"^    (?:import|from|print|ps\.|\w+ = \w+\().*", text, re.M), page


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_a_command_line_is_one_that_the_parser_takes(line: Line) -> None:
    name, *arguments = shlex.split(line.text)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    if arguments:
        command.make_context(name, arguments)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] if line.text.split()[0] in SLOW else [])
        for line in LINES
        if to_run(line)
    ],
    ids=lambda line: line.text,
)
def test_a_command_line_runs(cli: Callable[..., Any], work: Path, a_hub: Hub, line: Line) -> None:
    arguments = [STANDS_FOR.get(word, word) for word in shlex.split(line.text)]
    if arguments[0] == "sweep":
        Path("mine.yaml").write_text(SWEEP)
    if arguments[0] in ("evaluate", "predict") and "digits.onnx" in arguments:
        popup_surgery.export("digits.popup.safetensors", "digits.onnx")
    done = cli(*arguments)
    assert (done.status, done.err) == (0, "")
    if line.output:
        assert blurred(done.out.replace(a_hub.url, "https://huggingface.co")) == blurred(line.output)


def test_what_is_not_run_is_on_a_page() -> None:
    texts = [line.text for line in LINES]
    assert LONG.keys() <= set(texts)
    assert len(list(filter(to_run, LINES))) > 15, (
        "hardly any command line was found; has the form of the pages changed?"
    )
