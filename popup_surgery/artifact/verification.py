"""What `verify` found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verification:
    """Each check of a file by name: whether it holds, and a word on it. True where all hold."""

    checks: tuple[tuple[str, bool, str], ...]

    def __bool__(self) -> bool:
        return all(holds for _, holds, _ in self.checks)

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.checks)
        return "\n".join(f"{'ok  ' if holds else 'FAIL'}  {name:{width}}  {word}" for name, holds, word in self.checks)
