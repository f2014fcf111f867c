"""Every error hasten raises on purpose, each a single line that ends in what to do next.

Raised on every floor; the command line prints them without a traceback. This module knows no tensor and
formats nothing but its own fields.
"""

from __future__ import annotations


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


class HastenError(Exception):
    """Base of all errors raised on purpose; `str(error)` is always one line."""


class ArgumentError(HastenError, ValueError):
    """An argument has a wrong value: 'argument: expected ..., got ...; hint'.

    `argument` is the name as the caller wrote it, `expected` and `got` are short phrases, `hint` is the next
    step. Use `ArgumentTypeError` when the type, not the value, is wrong.
    """

    def __init__(self, argument: str, expected: object, got: object, hint: str) -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        super().__init__(_one_line(f"{argument}: expected {expected}, got {got}; {hint}"))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.argument, self.expected, self.got, self.hint)


class ArgumentTypeError(HastenError, TypeError):
    """An argument has a wrong type; same fields and message as `ArgumentError`."""

    def __init__(self, argument: str, expected: object, got: object, hint: str) -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        super().__init__(_one_line(f"{argument}: expected {expected}, got {got}; {hint}"))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.argument, self.expected, self.got, self.hint)


class UnsupportedError(HastenError, NotImplementedError):
    """A forced implementation was asked for something outside its envelope."""

    def __init__(self, implementation: str, reason: str, hint: str) -> None:
        self.implementation, self.reason, self.hint = implementation, reason, hint
        super().__init__(_one_line(f"implementation {implementation!r} cannot do this: {reason}; {hint}"))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.implementation, self.reason, self.hint)


class CheckpointError(HastenError):
    """A checkpoint is missing, truncated, of an unknown architecture, or does not fit the model."""

    def __init__(self, path: object, problem: str, hint: str) -> None:
        self.path, self.problem, self.hint = str(path), problem, hint
        super().__init__(_one_line(f"{path}: {problem}; {hint}"))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.path, self.problem, self.hint)


class MissingExtraError(HastenError, ImportError):
    """An optional dependency is absent; the message holds the command that installs it.

    `extra` is the name of the extra (serve, train, bench, dev), `needed_for` what the caller was doing.
    """

    def __init__(self, extra: str, needed_for: str) -> None:
        self.extra, self.needed_for = extra, needed_for
        self.command = f"pip install 'hasten[{extra}]'"
        super().__init__(_one_line(f"{needed_for} needs the extra {extra!r}; run: {self.command}"))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.extra, self.needed_for)
