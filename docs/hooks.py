"""What MkDocs cannot do by itself: pages made from the code, and links to files outside `docs/`.

A page says where generated text goes with a line `<!-- generated: NAME -->`; NAME is a key of `GENERATORS`. The text is
made whenever the site is built, so that it is always that of the code at hand.
"""

import html
import inspect
import json
import posixpath
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from typer.main import get_command

import popup_surgery
from popup_surgery import errors
from popup_surgery.commands import app
from popup_surgery.config.schema import Recipe

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"^<!-- generated: (.+) -->$", re.M)
OUTSIDE = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")  # the target of a link that begins with ../
SHOWN_AS = "repository"  # the site's folder for files of the repository outside docs/


# recipe keys


def recipe_keys() -> str:
    """Every key of a recipe, section by section: type, default, meaning."""
    return "\n\n".join([*(_section(name) for name in sections()), _whole()])


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe, and the classes of their keys."""
    found = {name: _models(field.annotation) for name, field in Recipe.model_fields.items()}
    return {name: models[0] for name, models in found.items() if models}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _whole() -> str:
    """The keys of a recipe that are no sections."""
    told, lines = described(Recipe.__doc__ or "", "Attributes"), ["## Beside the sections", ""]
    for name, field in Recipe.model_fields.items():
        if not _models(field.annotation):
            default = _yaml(field.get_default(call_default_factory=True))
            lines.append(f"`{name}`{{ #{name} }} {kind(field.annotation)}; default `{default}`")
            lines += [f":   {told[name]}", ""]
    return "\n".join(lines)


def _section(name: str) -> str:
    model, field = sections()[name], Recipe.model_fields[name]
    words = [kind(part) for part in get_args(field.annotation) if part is not model and part is not type(None)]
    there = "Required" if field.is_required() else "Optional"
    summary = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:")[0].strip()
    lines = [f"## {name}", "", f"{summary} {there}{''.join(f', or {word}' for word in words)}.", ""]
    by_text: dict[str, list[str]] = {}
    for key, text in meanings(name).items():
        by_text.setdefault(text or key, []).append(key)
    for text, keys in by_text.items():
        for key in keys:
            of = model.model_fields[key]
            default = (
                "required" if of.is_required() else f"default `{_yaml(of.get_default(call_default_factory=True))}`"
            )
            lines.append(f"`{name}.{key}`{{ #{name}.{key} }} {kind(of.annotation, of.metadata)}; {default}")
        lines += [f":   {text}", ""]
    return "\n".join(lines)


def meanings(section: str) -> dict[str, str]:
    """What each key of a section means: its description in the schema, its line in the class, or `convert`'s."""
    model = sections()[section]
    told = described(model.__doc__ or "", "Attributes")
    if section == "surgery":
        told = described(popup_surgery.convert.__doc__ or "", "Args") | told
    return {key: field.description or told.get(key, "") for key, field in model.model_fields.items()}


def described(doc: str, heading: str) -> dict[str, str]:
    """The entries `names: text` under a heading of a docstring; several names share one text."""
    _, _, body = inspect.cleandoc(doc).partition(f"{heading}:\n")
    body = re.split(r"^\S", body, maxsplit=1, flags=re.M)[0]
    found = {}
    for entry in re.split(r"^    (?=\S)", body, flags=re.M)[1:]:
        names, _, text = entry.partition(": ")
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def kind(annotation: Any, limits: Any = ()) -> str:
    """A type as somebody who writes YAML would say it."""
    words = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "any value"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        more = [limit for each in arguments[1:] for limit in getattr(each, "metadata", [each])]
        return kind(arguments[0], [*more, *limits])
    if origin in (Union, UnionType):
        return ", or ".join(kind(part) for part in arguments)
    if origin is Literal:
        return " or ".join(f"`{_yaml(word)}`" for word in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section of " + " and ".join(f"`{name}`" for name in annotation.model_fields)
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {kind(arguments[1])}"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {_number(getattr(limit, name))}"
        for name, sign in signs.items()
        for limit in limits
        if hasattr(limit, name)
    ]
    return " ".join([words[annotation], ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}^" if value > 1_000_000 and value == 2**power else f"{value:,}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[a-z0-9_-]+", value) else json.dumps(value)


# command line


def command_line() -> str:
    """Every command: usage, arguments, options, and an example with its output."""
    return "\n\n".join(_command(name, command) for name, command in commands().items())


def commands() -> dict[str, Any]:
    """The commands by name, as the parser has them."""
    return get_command(app).commands  # type: ignore[attr-defined]


def _command(name: str, command: Any) -> str:
    run = next(each.callback for each in app.registered_commands if each.name == name)
    types = {key: _type(hint) for key, hint in get_type_hints(run).items()}
    shown = [parameter for parameter in command.params if not parameter.hidden]
    places = [_placeholder(p) for p in shown if p.param_type_name == "argument"]
    call, _, output = inspect.cleandoc(command.epilog.partition("\b\n")[2]).partition("\n")
    lines = [f"## {name}", "", _plain(command.help), ""]
    lines += ["```text", " ".join(["popup-surgery", name, "[OPTIONS]", *places]), "```", ""]
    for parameter in shown:
        option = parameter.param_type_name == "option"
        names = _names(parameter, types[parameter.name]) if option else f"`{_placeholder(parameter)}`"
        lines += [names, f":   {_plain(parameter.help or '')}{_default(parameter) if option else ''}", ""]
    return "\n".join([*lines, "```console", call, output, "```"])


def _placeholder(argument: Any) -> str:
    text = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def _names(option: Any, value: str) -> str:
    names = [f"`{name}`" if option.is_flag else f"`{name} {value}`" for name in option.opts]
    # a flag that is neither on nor off by default has two forms worth knowing
    return ", ".join(names + [f"`{name}`" for name in option.secondary_opts if option.default is None])


def _type(hint: Any) -> str:
    """What stands for a value of this type on a command line."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if parts:  # of a list, or of what may be left out
        return _type(parts[0])
    if issubclass(hint, Enum):
        return "|".join(str(member.value) for member in hint)
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def _default(option: Any) -> str:
    default = getattr(option.default, "value", option.default)
    told = option.is_flag or default is None or "default: " in (option.help or "")
    return "" if told else f" Default: `{default}`."


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([*_\[\]|`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


# errors


def error_classes() -> str:
    """Every error of the public interface, from its docstring."""
    return "\n\n".join(f"::: popup_surgery.{name}\n    options: {{heading_level: 3}}" for name in error_names())


def error_names() -> list[str]:
    """The public errors, each after those that it derives from."""
    found = [getattr(errors, name) for name in popup_surgery.__all__ if hasattr(errors, name)]
    return [error.__name__ for error in sorted(found, key=lambda error: (len(error.__mro__), error.__name__))]


GENERATORS = {"recipe keys": recipe_keys, "command line": command_line, "errors": error_classes}


# hooks of MkDocs


def expand(markdown: str) -> str:
    """A page with its generated text in place.

    In a table the repository's page wants `\\|` for a bar within code, where Python-Markdown would show the backslash.
    """
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)
    return MARKER.sub(lambda found: GENERATORS[found[1]](), markdown)


def outside(markdown: str, page: str) -> Iterator[tuple[str, str]]:
    """Links of a page to files outside `docs/`: as written, and relative to the repository."""
    for link in OUTSIDE.findall(markdown):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
        if not path.startswith("docs/"):
            yield link, path


def on_files(files: Any, config: Any) -> Any:
    """Put files outside `docs/` that a page links to into the site."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        for _, path in outside(page.content_string, page.src_uri):
            target = f"{SHOWN_AS}/{path}"
            if files.get_file_from_path(target) is None and (ROOT / path).is_file():
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Generated text, and links that leave `docs/` to where `on_files` has put their targets."""
    if page.file.src_uri == "zoo.md":
        page.meta["search"] = {"exclude": True}  # 1,500 rows would bury every other result
    here = posixpath.dirname(page.file.src_uri)
    moved = {
        link: posixpath.relpath(f"{SHOWN_AS}/{path}", here or ".")
        for link, path in outside(markdown, page.file.src_uri)
    }
    return expand(OUTSIDE.sub(lambda found: moved.get(found[0], found[0]), markdown))
