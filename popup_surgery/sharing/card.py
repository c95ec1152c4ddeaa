"""The model card of a repository: metadata, its owner's text, and between two marks a section for each artifact."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..artifact import Artifact
from ..errors import PopupError
from .escape import markdown
from .metadata import Metadata, edit_yaml, metadata, read_yaml, renewed, to_yaml
from .sanity_table import SanityTable
from .section import section
from .summary import Summary
from .target import check_license, check_repo

BEGIN = "<!-- popup-surgery: begin. The next push replaces what is between the two marks; write above or below. -->"
END = "<!-- popup-surgery: end -->"
FILE = "<!-- popup-surgery: file {} -->"
_MARK = re.compile(r"^<!-- popup-surgery: (begin|end)\b[^\r\n]*-->[ \t]*\r?$", re.M)
_FILE = re.compile(r"^<!-- popup-surgery: file (\S+) -->[ \t]*\r?\n", re.M)

ABOUT = (
    "Each file below is a hidden network: frozen weights, and a mask that says which of them take part "
    "([paper](https://arxiv.org/abs/1911.13299)). "
    "[popup-surgery](https://github.com/popup-surgery/popup-surgery) wrote and reads it."
)


@dataclass(frozen=True)
class Card:
    """A README.md, in the parts that are kept and renewed.

    Attributes:
        before, after: the owner's text around the marked part.
        sections: the text about each artifact, by path.
        yaml: the metadata's text; None if there is none.
    """

    yaml: str | None = None
    before: str = ""
    after: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, what: str = "README.md") -> "Card":
        """Take a card apart. Lines end in line feeds.

        Raises:
            PopupError: a mark of the part to renew is missing, there twice, or out of order.
        """
        block = REGEX_YAML_BLOCK.search(text)
        yaml, body = (block.group(2), text[block.end() :]) if block else (None, text)
        marks = list(_MARK.finditer(body))
        if not marks:
            return cls(yaml, body)
        if [mark.group(1) for mark in marks] != ["begin", "end"]:
            found = ", ".join(mark.group(1) for mark in marks)
            raise PopupError(
                f"{what} has of popup-surgery's marks {found}; expected one begin and then one end: mend them, or "
                "remove them all, and a new part comes to the end"
            )
        first, last = marks
        pieces = _FILE.split(body[first.end() : last.start()])
        sections = {
            _unquoted(name): text.strip("\n") + "\n" for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
        }
        return cls(yaml, body[: first.start()], body[last.end() :].removeprefix("\n"), sections)

    def text(self) -> str:
        """Return the README.md."""
        marked = [BEGIN, ABOUT]
        for path in sorted(self.sections):
            marked += [FILE.format(_quoted(path)), self.sections[path].strip("\n")]
        front = f"---\n{self.yaml.strip(chr(10))}\n---\n" if self.yaml is not None else ""
        part = "\n\n".join([*marked, END]) + "\n"
        gap = "" if not self.before or self.before.endswith("\n\n") else "\n" if self.before.endswith("\n") else "\n\n"
        return f"{front}{self.before}{gap}{part}{self.after}"


def renew(
    there: str | None,
    sections: Mapping[str, str],
    written: Metadata,
    now: Metadata,
    *,
    name: str,
    license: str | None = None,
    what: str = "README.md",
) -> str:
    """Return a repository's card with these sections and this metadata. All that its owner wrote stays.

    Args:
        there: the card that is there; None if there is none.
        sections: the text about each artifact, by path.
        written: the metadata that the last push wrote.
        now: the metadata of the repository's artifacts.
        name: the heading of a new card.
        license: a license that was asked for, which replaces the card's.
        what: what messages call the card.

    Raises:
        PopupError: its marks or its metadata cannot be understood.
    """
    if there is None:
        return Card(to_yaml(now), f"\n# {markdown(name)}\n\n", "", sections).text()
    unix = there.replace("\r\n", "\n")
    card = Card.read(unix, what)
    yaml = card.yaml or ""
    values = read_yaml(yaml, what)
    if license is not None:
        written, now = {**written, "license": values.get("license")}, {**now, "license": license}
    yaml = edit_yaml(yaml, renewed(values, written, now))
    text = Card(yaml, card.before, card.after, sections).text()
    return text.replace("\n", "\r\n") if "\r\n" in there else text


def model_card(file: str | Path | Artifact, repo: str | None = None, *, license: str | None = None) -> str:
    """Return the model card of a popup artifact: the README.md of a new repository on the Hugging Face Hub with it.

    Metadata comes first, as YAML that the Hub understands; then Markdown. All text that comes from the file is escaped.
    A table of `popup-surgery sanity` beside the file becomes part of it. Nothing is sent anywhere.

    Args:
        file: the artifact.
        repo: the repository that the lines which load it name, `user/name`; without it they name the file.
        license: an identifier of the Hub's list of licenses, such as `apache-2.0`.

    Raises:
        ArtifactError: the file is no popup artifact, or damaged.
    """
    if repo is not None:
        check_repo(repo)
    check_license(license)
    artifact = Artifact.open(file)
    summary, path, sanity = Summary.of(artifact), name_of(artifact), None
    if artifact.remote is None:
        sanity = SanityTable.beside(Path(artifact.path), summary.sha256)
    elif repo is None:
        repo, path = artifact.remote.address.repo, artifact.remote.address.path
    name = repo.partition("/")[2] if repo else path.partition(".")[0]
    text = section(path, artifact.manifest, summary, repo=repo, picture=picture_of(path), sanity=sanity)
    return renew(None, {path: text}, {}, metadata({path: summary}, name, license), name=name)


def name_of(artifact: Artifact) -> str:
    """Return the name of an artifact's file."""
    path = artifact.path if artifact.remote is None else artifact.remote.address.path
    return re.split(r"[/\\]", str(path))[-1]


def picture_of(path: str) -> str:
    """Return the path of an artifact's picture in its repository."""
    return f"{path.removesuffix('.safetensors')}.png"


def _quoted(path: str) -> str:
    return quote(path, safe="/").replace("--", "-%2D")  # a comment of HTML has no --


def _unquoted(text: str) -> str:
    return unquote(text)
