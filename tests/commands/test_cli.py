"""The command line as people call it, and the properties of the package's imports."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.requirements import Requirement

import popup_surgery
from popup_surgery import build, convert, load, save
from popup_surgery.config.catalog import find, shipped, shipped_sweeps
from support import PATIENCE, slow_except, write_digit

COMMANDS = (
    "convert", "train", "evaluate", "predict", "sanity", "inspect", "verify", "diff", "export", "recipes", "zoo",
    "sweep", "reproduce", "repack",
)  # fmt: skip
PACKAGE = Path(popup_surgery.__file__).parent
ROOT = PACKAGE.parent
Cli = Callable[..., Any]


def python(*arguments: str, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, **options
    )


def refused(outcome: Any, *says: str, lines: int = 1) -> None:
    """Status 2, a sentence on stderr, nothing on stdout, no traceback."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    written = outcome.err.strip().splitlines()
    assert len(written) == lines, outcome.err
    for word in says:
        assert re.search(word, outcome.err), (word, outcome.err)


# help


def blurred(text: str) -> str:
    """Text without its numbers and its spaces: a figure may differ, a word may not."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", text)).strip()


def example(help_text: str) -> tuple[list[str], str]:
    """The call in a help text, as arguments, and the output below it."""
    lines = help_text.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.strip().startswith("$ popup-surgery ")]
    output = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        output.append(line)
    return shlex.split(lines[start].strip().removeprefix("$ popup-surgery ")), "\n".join(output)


@pytest.mark.parametrize("command", slow_except(COMMANDS, set(COMMANDS) - {"sweep", "reproduce", "zoo", "bench"}))
def test_help_has_a_real_call_and_its_real_output(cli: Cli, artifact: Path, command: str) -> None:
    shown = cli(command, "--help")
    assert shown.status == 0
    assert shown.err == ""
    arguments, wanted = example(shown.out)
    assert arguments[0] == command
    if "digit.png" in arguments:
        write_digit(artifact.parent / "digit.png", 4)
    if "other.popup.safetensors" in arguments:
        other = build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8)
        save(convert(other, 0.5, seed=1), artifact.parent / "other.popup.safetensors")
    if "conv4.popup.safetensors" in arguments:
        save(convert(build("popup_surgery/conv4"), 0.3), artifact.parent / "conv4.popup.safetensors")
    assert wanted, "no output below the call"
    outcome = cli(*arguments)
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    assert blurred(outcome.out) == blurred(wanted)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_the_call(cli: Cli, command: str) -> None:
    text = cli(command, "--help").out
    assert text.index("$ popup-surgery") > text.index("--help"), (
        "the issue: --help ends with a real call and its output"
    )


def test_help_names_all_commands(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.status == 0
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\s", shown.out, re.M), command


@pytest.mark.parametrize("arguments", [("--help",), ("convert", "--help"), ("train", "--help"), ("--version",)])
def test_help_does_not_import_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from popup_surgery.commands import main; "
        f"sys.argv = ['popup-surgery', *{arguments!r}]; status = main(); "
        "heavy = {'torch', 'timm', 'torchvision', 'accelerate', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy)); sys.exit(status)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_is_light_to_import() -> None:
    code = (
        "import sys, popup_surgery; dir(popup_surgery); first = 'torch' in sys.modules; "
        "popup_surgery.convert, popup_surgery.save, popup_surgery.build; "
        "print(first, sorted({'timm', 'torchvision', 'accelerate', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout == "False []\n", done.stderr


def test_everything_that_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {Requirement(line).name.lower() for line in project["dependencies"] + extras}
    names = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", "onnx_ir": "onnx-ir"}
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(str(node.module).split(".")[0])
    used = {names.get(name, name) for name in used if name not in sys.stdlib_module_names}
    assert used - {"triton"} <= declared, sorted(used - declared)  # PyTorch brings Triton where it serves


def test_the_module_and_the_checkout_start_it_too(tmp_path: Path) -> None:
    version = f"popup-surgery {popup_surgery.__version__}\n"
    assert python("-m", "popup_surgery", "--version", cwd=tmp_path).stdout == version
    assert python(str(ROOT / "cli.py"), "--version", cwd=tmp_path).stdout == version
    script = Path(sys.executable).with_name("popup-surgery")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == version
    done = python(str(ROOT / "cli.py"), "recipes", "digts", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


# bad use


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("frobnicate",), "frobnicate"),
        (("convert",), "(?i)arch"),
        (("convert", "conv4", "--bogus"), "--bogus"),
        (("convert", "conv4", "--k", "many"), "--k|many"),
        (("convert", "conv4", "--scope", "network"), "network"),
        (("export", "file"), "(?i)output|-o"),
        (("train", "digits", "--set"), "--set"),
    ],
)
def test_a_wrong_call_is_status_2_and_no_traceback(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    outcome = cli(*arguments)
    assert outcome.status == 2
    assert re.search(says, outcome.err), outcome.err
    assert re.findall("(?i)^error: ", outcome.err, re.M) == ["error: "], "the same word as for all other errors"
    assert "Traceback" not in outcome.err


def test_no_arguments_at_all_show_the_help(cli: Cli) -> None:
    outcome = cli()
    assert outcome.status in (0, 2)
    assert "convert" in outcome.out + outcome.err


def test_a_wrong_call_in_a_process_of_its_own() -> None:
    done = python("-m", "popup_surgery", "convert", "conv4", "--bogus")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: No such option: --bogus"
    assert "Traceback" not in done.stderr


# convert


def test_convert_writes_a_file_and_prints_the_totals(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["convert", "timm/test_resnet", "--num-classes", "7", "--in-chans", "1", "--k", "0.25", "--seed", "9"]
    call += ["--no-scaled", "--scheme", "kaiming_normal"]
    done = cli(*call)
    assert (done.status, done.err) == (0, "")
    file = tmp_path / "test_resnet.popup.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    manifest = popup_surgery.inspect(file)
    assert f"{len(manifest.masked)} layers masked, {manifest.weights:,} weights, {manifest.kept:,} kept" in done.out
    assert f"wrote {file.name}" in done.out
    assert manifest.seed == 9
    assert manifest.architecture.name == "test_resnet"
    assert dict(manifest.architecture.kwargs) == {"num_classes": 7, "in_chans": 1}
    assert {entry.distribution for entry in manifest.masked} == {"normal"}
    assert manifest.kept == sum(e.numel - int(0.75 * e.numel) for e in manifest.masked)
    assert load(file)(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    before = file.read_bytes()
    refused(cli(*call), "exists already", "--force")
    assert file.read_bytes() == before
    assert cli(*call, "--force").status == 0
    assert file.read_bytes() == before
    assert cli(*call, "--seed", "10", "--force").status == 0
    assert file.read_bytes() != before


def test_convert_resnet18(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "small.popup.safetensors"
    done = cli("convert", "resnet18", "-o", file)
    assert done.status == 0, done.err
    manifest = popup_surgery.inspect(file)
    assert manifest.weights == 11_678_912
    assert file.stat().st_size <= manifest.weights / 8 + 600_000
    assert "11,678,912" in done.out


def test_a_dry_run_writes_nothing_and_prints_the_plan(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("convert", "resnet101", "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert "44,442,816" in done.out
    assert "layer4.2.conv3.weight" in done.out
    assert len(re.findall(r"^ *\S+\.weight +\w+ +\d+ × ", done.out, re.M)) == 105
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("k", ["0", "1.2", "nan", "-0.5", "inf"])
@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_a_bad_k(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: str, extra: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("convert", "conv2", "--k", k, *extra), r"\bk\b", re.escape(k.removesuffix("0") or "0"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rsenet50",), r"rsenet50.*nearest.*\bresnet50\b"),
        (("tim/resnet50",), r"nearest.*\btimm\b"),
        (("popup_surgery/conv3",), r"nearest.*\bconv\d, conv\d, conv\d"),
        (("conv2", "--scheme", "kaiming_norml"), r"nearest.*\bkaiming_normal\b"),
        (("conv2", "--learner", "popup"), r"nearest.*\bedge_popup\b"),
        (("conv2", "--include", "feature.*"), r"feature\.\*.*nearest.*features"),
        (("conv2", "--exclude", "*"), "leave none"),
        (("conv2", "--k", "1e-17"), "keeps none"),
        (("conv2", "--seed", "-1"), "seed"),
        (("conv2", "--seed", str(2**64)), "seed"),
        (("conv2", "--num-classes", "-1"), "num_classes"),
        (("conv2", "--img-size", "1"), "img_size"),
        (("conv2", "-o", "no/such/folder/file"), "no/such/folder"),
    ],
)
def test_what_convert_refuses(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("convert", *arguments), says)
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture_has_three_nearest_names(cli: Cli) -> None:
    outcome = cli("convert", "resnet1010")
    refused(outcome, r"nearest")
    names = outcome.err.strip().rsplit(": ", 1)[1].split(", ")
    assert len(names) == 3
    assert "resnet101" in names
    assert set(names) <= set(timm.list_models()) | {"conv2"}


def test_convert_in_place_of_a_folder(cli: Cli, tmp_path: Path) -> None:
    refused(cli("convert", "fc", "-o", tmp_path, "--force"), re.escape(str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_loses_nothing(artifact: Path) -> None:
    """In a process of its own, in which no file grows beyond 4,000 bytes: pytest itself writes files."""
    target = artifact.parent / "dense.safetensors"
    target.write_text("precious")
    calls = [
        ["convert", "fc", "-o", artifact.name, "--force"],
        ["export", artifact.name, "-o", target.name, "--force"],
        ["train", "digits", "--set", "training.epochs=1", "-o", "run"],
    ]
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "from popup_surgery.commands import main\n"
        f"for call in {calls!r}:\n"
        "    sys.argv = ['popup-surgery', *call]\n"
        "    print('status', main())\n"
    )
    before = artifact.read_bytes()
    done = python("-B", "-c", code, cwd=artifact.parent)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^status (\d)", done.stdout, re.M) == ["2", "2", "2"]
    assert len(re.findall(r"^error: \S+ cannot be written", done.stderr, re.M)) == len(done.stderr.splitlines()) == 3
    assert artifact.read_bytes() == before
    assert target.read_text() == "precious"
    assert {path.name for path in artifact.parent.iterdir()} == {target.name, artifact.name, "run"}
    assert not list(artifact.parent.rglob("*.part"))


# inspect, verify, evaluate


def test_inspect_as_json(cli: Cli, artifact: Path) -> None:
    done = cli("inspect", artifact, "--json")
    assert (done.status, done.err) == (0, "")
    values = json.loads(done.out)
    assert values["architecture"]["name"] == "conv2"
    assert len(values["masked"]) == 5
    assert values == json.loads(json.dumps(popup_surgery.inspect(artifact).text()))


def test_inspect_shows_each_layer(cli: Cli, artifact: Path) -> None:
    done = cli("inspect", artifact)
    assert (done.status, done.err) == (0, "")
    assert len(re.findall(r"^\S+\.weight ", done.out, re.M)) == 5
    assert "11,784 of 23,568" in done.out


def test_verify_says_yes(cli: Cli, artifact: Path) -> None:
    done = cli("verify", artifact)
    assert (done.status, done.err) == (0, "")
    assert "23,568" in done.out
    assert "FAIL" not in done.out


@pytest.mark.parametrize("place", [0, 0.05, 0.3, 0.6, -1])
def test_verify_says_no_where_one_bit_is_flipped(cli: Cli, artifact: Path, place: float) -> None:
    data = bytearray(artifact.read_bytes())
    at = -1 if place == -1 else int(place * len(data))
    data[at] ^= 1
    artifact.write_bytes(data)
    done = cli("verify", artifact)
    assert done.status == 1
    assert "FAIL" in done.out
    assert done.out.count("\n") <= 5
    assert "Traceback" not in done.out + done.err


def test_verify_of_a_truncated_file(cli: Cli, artifact: Path) -> None:
    artifact.write_bytes(artifact.read_bytes()[:-1])
    done = cli("verify", artifact)
    assert done.status == 1
    assert "digits.popup.safetensors" in done.out


@pytest.mark.parametrize(
    "command", [("inspect",), ("verify",), ("evaluate",), ("sanity",), ("export", "-o", "out.safetensors")]
)
def test_a_file_that_is_not_there(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli(*command, "nowhere.popup.safetensors"), "nowhere.popup.safetensors")
    refused(cli(*command, tmp_path), re.escape(str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("inspect",), ("evaluate",), ("sanity",), ("export", "-o", "out.safetensors")])
def test_a_file_that_is_no_artifact(cli: Cli, artifact: Path, command: tuple[str, ...]) -> None:
    for content in (b"", b"PK\x03\x04 a pickle", artifact.read_bytes()[:-100], b"\xff" * 9000):
        artifact.write_bytes(content)
        refused(cli(*command, artifact), "digits.popup.safetensors")
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_evaluate_prints_the_accuracy(cli: Cli, artifact: Path, digits_run: popup_surgery.Result) -> None:
    done = cli("evaluate", artifact)
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{100 * digits_run.accuracy:.2f} % of 359 validation images of digits\n"
    assert cli("evaluate", artifact, "--set", "data.batch_size=7").out == done.out


def test_what_evaluate_refuses(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    refused(cli("evaluate", artifact, "--set", "data.batchsize=7"), r"data\.batchsize.*batch_size")
    refused(cli("evaluate", artifact, "--set", "data.name=folder"), "--data-dir")
    missing = tmp_path / "nowhere"
    refused(cli("evaluate", artifact, "--set", "data.name=folder", "--data-dir", missing), "does not exist")
    refused(cli("evaluate", artifact, "--set", "training.epochs=7"), r"training")


# export


def test_export_of_a_timm_network_is_what_timm_loads(cli: Cli, tmp_path: Path) -> None:
    file, dense = tmp_path / "net.popup.safetensors", tmp_path / "net.safetensors"
    model = convert(build("timm/test_resnet", num_classes=7), 0.5, seed=3)
    model(torch.randn(4, 3, 64, 64))
    save(model, file)
    done = cli("export", file, "-o", dense)
    assert (done.status, done.err) == (0, "")
    theirs = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(dense)).state_dict()
    ours = load(file).state_dict()
    assert list(theirs) == list(ours)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key
    assert any(key.endswith("running_mean") and tensor.abs().sum() > 0 for key, tensor in ours.items())
    assert f"{len(ours)} tensors of timm/test_resnet" in done.out
    before = dense.read_bytes()
    refused(cli("export", file, "-o", dense), "exists already", "--force")
    assert cli("export", file, "-o", dense, "--force").status == 0
    assert dense.read_bytes() == before


def test_export_onto_the_artifact_itself(cli: Cli, artifact: Path) -> None:
    before = artifact.read_bytes()
    for call in (("export", artifact, "-o", artifact), ("export", artifact, "-o", artifact, "--force")):
        refused(cli(*call), "which the command reads; choose another name with -o")
    assert artifact.read_bytes() == before


# recipes and train


def test_recipes_are_listed_shown_and_copied(cli: Cli, tmp_path: Path) -> None:
    assert cli("recipes").out.split() == shipped() + shipped_sweeps()
    assert cli("recipes", "cifar10/conv6").out == find("cifar10/conv6").read_text()
    copy = tmp_path / "mine.yaml"
    assert cli("recipes", "digits", "-o", copy).status == 0
    assert copy.read_bytes() == find("digits").read_bytes()
    refused(cli("recipes", "cifar10/conv2", "-o", copy), "exists already")
    assert copy.read_bytes() == find("digits").read_bytes()
    assert cli("recipes", "cifar10/conv2", "-o", copy, "--force").status == 0
    assert copy.read_bytes() == find("cifar10/conv2").read_bytes()
    refused(cli("recipes", "digts"), r"nearest.*\bdigits\b")
    refused(cli("recipes", "-o", tmp_path / "other.yaml"), "name")


def test_a_sweep_is_no_recipe(cli: Cli, tmp_path: Path) -> None:
    refused(
        cli("train", "paper/figure3"),
        r"^error: paper/figure3 is a sweep; run it with popup-surgery sweep paper/figure3$",
    )
    refused(cli("sweep", "paper/figur3"), r"nearest.*paper/figure3")
    copy = tmp_path / "mine.yaml"
    assert f"run it with popup-surgery sweep {copy}\n" in cli("recipes", "paper/figure3", "-o", copy).out
    refused(cli("train", copy), "is a sweep")


def test_train_writes_where_it_is_told(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("train", "digits", "--set", "training.epochs=1", "--set", "surgery.k=0.25", "--output", run)
    assert (done.status, done.err) == (0, "")
    for word in ("accuracy", "kept", "file", "time", "speed"):
        assert re.search(rf"^{word}\s+\S", done.out, re.M), word
    assert len(re.findall(r"^epoch 1/1 ", done.out, re.M)) == 1
    assert popup_surgery.inspect(run / "digits.popup.safetensors").kept == 5892
    before = {path: path.read_bytes() for path in run.iterdir()}
    refused(cli("train", "digits", "--set", "training.epochs=1", "--output", run), "holds a run", re.escape(str(run)))
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("digts",), r"digts.*nearest.*\bdigits\b"),
        (("mine.yaml",), "mine.yaml"),
        (("digits", "--set", "training.epochs"), "key=value"),
        (("digits", "--set", "training.epoch=3"), r"training\.epoch.*\bepochs\b"),
        (("digits", "--set", "surgery.k=0"), r"surgery\.k"),
        (("digits", "--set", "surgery.k=1.2"), r"surgery\.k"),
        (("digits", "--set", "surgery.k=.nan"), r"surgery\.k"),
        (("digits", "--set", "model.name=conv3"), r"conv3.*nearest.*conv2|conv3.*nearest.*conv4"),
        (("digits", "--set", "surgery.include=nothing.*"), r"nothing\.\*.*nearest"),
        (("cifar10/conv2",), "--data-dir"),
        (("cifar10/conv2", "--data-dir", "nowhere"), "nowhere.*does not exist"),
        (("cifar10/conv2", "--data-dir", "."), r"data\.download=true"),
        (("cifar10/conv2", "--data-dir", ".", "--set", "data.name=folder"), "train"),
        (("digits", "--set", "training.lr=1e30", "--set", "surgery=none"), r"step \d+, in epoch 1, is not finite"),
        (("digits", "--output", "/proc/self/run"), "cannot be written"),
    ],
)
def test_what_train_refuses(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("train", *arguments), says)


def test_a_recipe_with_three_mistakes_gets_three_lines(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = find("digits").read_text().replace("k: 0.5", "k: 1.2").replace("signed_kaiming_constant", "kaiming_norml")
    path.write_text(text.replace("epochs:", "epochz:"))
    outcome = cli("train", path)
    # `epochz` is an unknown key and `epochs` is missing then: two lines of the four below the heading
    refused(
        outcome,
        r"surgery\.k is 1\.2",
        r"kaiming_normal\b",
        r"training\.epochz .*\bepochs\b",
        r"epochs is missing",
        lines=5,
    )


def test_a_folder_of_other_classes(cli: Cli, tmp_path: Path, make_images: Callable[..., None]) -> None:
    make_images(tmp_path / "data" / "train", ("a", "b"), count=1, size=(8, 8))
    make_images(tmp_path / "data" / "validation", ("a", "c"), count=1, size=(8, 8))
    call = ("train", "digits", "--set", "data.name=folder", "--data-dir", tmp_path / "data", "-o", tmp_path / "run")
    refused(cli(*call), "different classes")
    assert not (tmp_path / "run").exists()


def test_convert_spreads_k_by_a_rule_and_keeps_a_floor(cli: Cli) -> None:
    planned = json.loads(cli("convert", "conv4", "--k", "0.1", "--k-rule", "erk", "--dry-run", "--json").out)
    assert planned["settings"]["k"] == {"rule": "erk", "k": 0.1}
    assert planned["masked"][0]["kept"] == 1728 == planned["masked"][-1]["kept"] - 832
    together = cli("convert", "conv4", "--k", "0.1", "--scope", "global", "--floor", "16", "--dry-run")
    assert "ranked over all layers, each keeps at least 16" in together.out
    for words, said in (
        (["--k-rule", "erks"], "rule is 'erks'; expected balanced, erk, fan or uniform"),
        (["--floor", "0.1"], "floor is 0.1; expected none unless scope is global"),
        (["--k-rule", "erk", "--scope", "global"], "scope='global' ranks all layers together"),
    ):
        done = cli("convert", "conv4", "--dry-run", *words)
        assert done.status == 2
        assert said in done.err


def test_convert_fixes_weights_before_training(cli: Cli, tmp_path: Path) -> None:
    call = ["convert", "conv2", "--k", "0.3", "--fixed", "dropped=0.5", "--fixed", "kept=0.1"]
    planned = json.loads(cli(*call, "--dry-run", "--json").out)
    assert planned["settings"]["fixed"] == {"dropped": 0.5, "kept": 0.1}
    assert planned["masked"][0]["fixed"] == {"dropped": 864, "kept": 173}
    done = cli(*call, "--encoding", "range_coded", "-o", tmp_path / "net")
    assert "50.0% fixed as dropped and 10.0% as kept" in done.out
    assert re.search(
        r"^fixed by the seed: 2,150,\d+ weights dropped, 430,\d+ kept$", cli("inspect", tmp_path / "net").out, re.M
    )
    for word, said in (
        ("dropped", "--fixed 'dropped'; expected dropped=SHARE or kept=SHARE, such as dropped=0.5"),
        ("kept=many", "--fixed 'kept=many'; expected dropped=SHARE"),
        ("drop=0.5", "'drop' is not one of its keys; nearest: dropped"),
        ("dropped=0.9", "k is 0.3; expected a k above 0 and up to 0.1, as kept and dropped leave it"),
        ("dropped=0.2 dropped=0.1", "--fixed 'dropped=0.1'; expected dropped once"),
    ):
        done = cli("convert", "conv2", "--dry-run", *(arg for one in word.split() for arg in ("--fixed", one)))
        assert done.status == 2
        assert said in done.err
