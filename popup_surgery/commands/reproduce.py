from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PopupError, Stopped
from .shared import busy, messages, show
from .sweep import Address, DryRun, GpusPerRun, Jobs, OnOption, Pack, Seeds, Threads, chosen, estimate, shown

if TYPE_CHECKING:
    from ..reproduce import Reproduction


class Scale(StrEnum):
    full = "full"
    small = "small"
    tiny = "tiny"


def run(
    figure: Annotated[str, typer.Argument(help="figure3 to figure10, table2, or equal-bytes.")],
    scale: Annotated[
        Scale, typer.Option(help="full: the paper's protocol; small: some hours on two CPU cores; tiny: a smoke test.")
    ] = Scale.full,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value of any recipe key; key=[value, …] replaces the values that the figure varies; repeatable.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Label of a series or network to run; default: all; repeatable.")
    ] = None,
    seeds: Seeds = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs, which the figures share.")] = Path(
        "runs/paper"
    ),
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    jobs: Jobs = None,
    threads: Threads = None,
    pack: Pack = None,
    on: OnOption = None,
    address: Address = None,
    gpus_per_run: GpusPerRun = None,
    dry_run: DryRun = False,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Draw from an archive of finished runs that benchmarks/gpu.py wrote; run nothing."),
    ] = None,
) -> int:
    """Reproduce a figure or table of the paper: run its sweep, draw it, and print it beside the paper's numbers.

    equal-bytes is not in the paper: it compares methods by accuracy over bytes of masks and stored tensors.

    \b
    $ popup-surgery reproduce figure7 --scale tiny --only 'Signed Constant' --set 'surgery.k=[0.5]' \
--set data.name=digits --set 'model.kwargs={in_chans: 1, img_size: 8}' --set data.mean=null --set data.std=null
    1/1  Signed Constant model.name=popup_surgery/conv4 surgery.k=0.5 seed 0  accuracy 6.25 %  0.1 s
    # The distribution of the weights: CIFAR-10
    Scale: tiny; 32 training and 16 validation images; batch: 16; epochs: 1; seeds: 1
    set: surgery.k=[0.5]; data.name=digits; model.kwargs={in_chans: 1, img_size: 8}; data.mean=null; data.std=null.
    | network | series | weights kept (%) | accuracy (%) | seeds | paper (%) | difference |
    | --- | --- | --- | --- | --- | --- | --- |
    | conv4 | Signed Constant | 50 | 6.25 | 1 |  |  |
    | conv4 | Signed Constant | best, 50 | 6.25 | 1 | 86 (figure 3) | -79.8 |
    wrote runs/paper/figure7-tiny.md, .json, .png and .svg
    """
    with busy("starting"):
        from .. import reproduce as reproducing
        from ..config.yaml import parse_yaml

        if from_ is not None:
            given = {
                "--set": set_, "--only": only, "--seeds": seeds, "--data-dir": data_dir, "--on": on, "--jobs": jobs,
                "--pack": pack, "--dry-run": dry_run,
            }  # fmt: skip
            if others := [name for name, value in given.items() if value]:
                raise PopupError(f"{others[0]} has no effect with --from, which runs nothing; leave out one of the two")
            return _print(reproducing.redraw(figure, from_, output))
        engine = chosen(jobs, threads, pack, on, address, gpus_per_run, data_dir)
        number = None if seeds is None else parse_yaml(seeds, f"--seeds {seeds}")
        sweep = reproducing.sweep_of(figure, scale.value, set_ or (), only=only or (), seeds=number, data_dir=data_dir)
    if dry_run:
        estimate(sweep, output, engine)
        return 0
    try:
        with shown(output) as report:
            done = reproducing.reproduce(figure, scale.value, sweep, output, engine, report, set_ or ())
    except Stopped as error:
        messages.print(f"{error}; run the same command again to resume", markup=False, soft_wrap=True)
        return error.status
    return _print(done)


def _print(done: "Reproduction") -> int:
    """Print the table and name the files. Returns the exit status."""
    print("\n".join(line for line in done.table.splitlines() if line))
    show(f"wrote {done.files[0]}, {', '.join(path.suffix for path in done.files[1:-1])} and {done.files[-1].suffix}")
    return 1 if any(outcome.state.value == "failed" for outcome in done.outcomes) else 0
