"""The recipe key `surgery.encoding`: how the run's file stores its masks, and nothing else."""

from pathlib import Path

import pytest

from popup_surgery import Recipe, RecipeError, inspect, train
from popup_surgery.config.keys import fingerprint
from support import GOLDEN

TINY = GOLDEN / "tiny.yaml"
CODED = "surgery.encoding=range_coded"


def test_the_file_of_a_run_is_written_in_the_encoding_of_the_recipe(tmp_path: Path) -> None:
    short = ["training.epochs=1", "data.max_train=64"]
    plain = train(TINY, overrides=short, output=tmp_path / "plain")
    coded = train(TINY, overrides=[*short, CODED], output=tmp_path / "coded")
    assert {entry.encoding for entry in inspect(plain.file).masked} == {"bitpack"}
    assert {entry.encoding for entry in inspect(coded.file).masked} == {"range_coded"}
    assert inspect(coded.file).masks_sha256 == inspect(plain.file).masks_sha256
    data = coded.file.read_bytes()
    again = train(TINY, overrides=short, output=tmp_path / "coded", resume=True)
    assert (again.accuracy, again.kept) == (coded.accuracy, coded.kept), "the same run, which is finished"
    assert coded.file.read_bytes() == data


def test_no_result_depends_on_it() -> None:
    assert fingerprint(Recipe.load(TINY)) == fingerprint(Recipe.load(TINY, [CODED]))


def test_what_is_no_encoding_or_has_no_masks_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"surgery\.encoding is 'zip': unknown encoding 'zip'; expected one of bitpack"
    ):
        Recipe.load(TINY, ["surgery.encoding=zip"])
    with pytest.raises(RecipeError, match=r"surgery\.encoding is .?range_coded.?; .*dnw trains the weights, so that"):
        Recipe.load(TINY, [CODED, "surgery.learner=dnw"])
