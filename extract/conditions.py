"""The language in which tokens are selected: conditions by name, combined with `and`, `or`, `not` and parentheses.

    all                       every token
    first, first(4)           the first tokens of a document
    last, last(4)             the last ones
    positions(0, 1, -1)       tokens by their places, from the start or, negative, from the end
    every(8)                  every eighth token of a document
    fraction(0.1, seed=0)     a random part, by a hash of document id and position: the same one in every run
    prompt, completion        before and after where a document's completion begins
    tokens(13, "the")         tokens by id, or by their text
    kind("word", "digit")     tokens by what they stand for: word, digit, punctuation, space, mixed, partial, special

For example: `completion and not kind("space") or last`. The grammar is that of Python's expressions, of which nothing
else is taken; nothing is ever executed.
"""

import ast
import json

from actstore.errors import InputError

ALL = "all"
KINDS = ("word", "digit", "punctuation", "space", "mixed", "partial", "special")
_DEEPEST = 50
_HELP = (
    "expected conditions such as last, first(4), positions(0, -1), every(8), fraction(0.1), prompt, completion, "
    'tokens(13), kind("word"), combined with and, or, not'
)


def parsed(text: str) -> ast.expr:
    """The tree of a condition that is sound.

    Raises:
        InputError: it is not.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        depth = _depth(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"rows are {text[:200]!r}, which cannot be understood; {_HELP}") from None
    if depth > _DEEPEST:
        raise InputError(f"rows {text[:200]!r} are nested {depth} deep, at most {_DEEPEST}; {_HELP}")
    _check(tree, text)
    return tree


def _depth(node: ast.AST) -> int:
    return 1 + max((_depth(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)), default=0)


def _check(node: ast.expr, text: str) -> None:
    """Refuses everything that is no condition."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text)
    elif isinstance(node, ast.Name) and node.id in (ALL, "first", "last", "prompt", "completion"):
        pass
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        problem = _arguments(node.func.id, node)
        if problem:
            raise InputError(f"rows have {ast.unparse(node)[:100]}; {problem}; {_HELP}")
    else:
        raise InputError(f"rows have {ast.unparse(node)[:100]!r}, which is no condition; {_HELP}")


def _arguments(name: str, call: ast.Call) -> str:
    """What is wrong with the arguments of a condition; empty for nothing."""
    try:
        given = [ast.literal_eval(argument) for argument in call.args]
        seeds = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError, SyntaxError):
        return "expected plain numbers or texts inside the parentheses"
    if seeds and not (
        name == "fraction" and [*seeds] == ["seed"] and type(seeds["seed"]) is int and seeds["seed"] >= 0
    ):
        return "expected no name inside the parentheses but seed= of a fraction, a whole number from 0"
    whole = all(type(each) is int and abs(each) < 1 << 31 for each in given)
    match name:
        case "first" | "last" | "every":
            good = whole and len(given) <= 1 and all(each > 0 for each in given) and (name != "every" or bool(given))
            return "" if good else "expected one whole number from 1"
        case "positions":
            return "" if whole and given else "expected whole numbers, from 0 or, from the end, -1"
        case "fraction":
            good = len(given) == 1 and type(given[0]) in (int, float) and 0 < given[0] <= 1
            return "" if good else "expected a number over 0 and up to 1"
        case "tokens":
            return "" if given and all(type(each) in (int, str) for each in given) else "expected token ids or texts"
        case "kind":
            good = bool(given) and all(isinstance(each, str) and each in KINDS for each in given)
            return "" if good else f"expected one or more of {json.dumps(KINDS)[1:-1]}"
        case _:
            return f"there is no condition {name!r}"


def kind_of(piece: bytes) -> str:
    """What a token stands for."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "partial"
    word = text.strip()
    if not word:
        return "space"
    if word.isalpha():
        return "word"
    if word.isdigit():
        return "digit"
    return "mixed" if any(character.isalnum() for character in word) else "punctuation"
