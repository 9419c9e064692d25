"""Chat templates as Jinja programs that can write text and nothing else, in the dialect of transformers.

A template comes with a model, from whoever made it. It sees plain JSON values and reaches no file, no attribute of
Python's inner workings and no name but those below. Time and memory are bounded only in part: a `range` has at most
100,000 numbers, which is jinja2's rule, and a text at most `MOST_CHARACTERS`.
"""

import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox, utils

MOST_CHARACTERS = 1 << 26  # the text of one chat: more than fills the longest context of any model


class RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`: it does not want these messages."""


class EndlessError(jinja2.TemplateError):
    """The template writes more than any chat can be."""


class Program:
    """A compiled template."""

    def __init__(self, source: str, *, now: dt.datetime | None) -> None:
        """Compiles; `now` is what `strftime_now` tells, None for the moment of each rendering.

        Raises:
            jinja2.TemplateError: `source` is no template.
        """
        environment = _environment(now)
        self._template = environment.from_string(source)
        self.reads_the_clock = any(
            name.name == "strftime_now" for name in environment.parse(source).find_all(nodes.Name)
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables.

        Raises:
            RefusedError, EndlessError, jinja2.TemplateError: as they say.
            Exception: anything else that an expression of a template can raise.
        """
        pieces: list[str] = []
        characters = 0
        for piece in self._template.generate(dict(variables)):
            characters += len(piece)
            if characters > MOST_CHARACTERS:
                raise EndlessError(f"more than {MOST_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def _environment(now: dt.datetime | None) -> sandbox.ImmutableSandboxedEnvironment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "dict": _Dict(), "namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _clock(now),
    }  # fmt: skip
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  order and names are those of transformers
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as models were trained on: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise RefusedError(str(message))


def _clock(now: dt.datetime | None) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return (now or dt.datetime.now()).strftime(form)  # local time without a zone, as transformers has it

    return strftime_now


class _Dict:
    """Makes dictionaries, and has none of the methods of the type `dict`, which change what they are given."""

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(utils.Namespace):
    """Variables that outlive a loop. Python asks objects for names with underscores, so a template sets none."""

    def __init__(self, /, *arguments: Any, **attributes: Any) -> None:
        found = dict(*arguments, **attributes)
        for name in found:
            _check_attribute(name)
        super().__init__(found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


class _Generation(ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what transformers marks as written by the assistant, here as it is.

    It is a scope of its own there, so it is one here: what is set inside is not seen after it.
    """

    tags = {"generation"}  # noqa: RUF012  the name and type are jinja2's

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
