"""The grammar of a source's `where`: a condition on the fields of a sample's `.json` member.

::

    width >= 512 and similarity > 0.3
    license in ["cc-by", "cc0"] or not nsfw
    0.5 < width_by_height <= 2 and "cat" in caption and exif.model is not missing

A text is parsed as a Python expression, of which only what is listed here is taken; nothing is ever evaluated by
Python. It means what it means in Python, where all fields are there and have the types that they are compared with.
Where that is not so, a comparison is neither true nor false but undecided, as in SQL: `not` of it is undecided, too,
and `and` and `or` are undecided unless the other side decides. A sample is chosen if the whole is true.
"""

from __future__ import annotations

import ast
import io
import keyword
import operator
import re
import tokenize
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST_CHARACTERS = 10_000
_MOST_NESTED = 50
_GRAMMAR = (
    "comparisons (< <= > >= == !=, in, not in) of fields with numbers, texts, true and false, joined by and, or, not"
)
_MISSING = "missing"
_IF_MISSING = f"FIELD is {_MISSING}, or FIELD is not {_MISSING}"
_NAMED = {"true": True, "false": False}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
}
_FUNCTIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


class WhereError(ValueError):
    """A text that is no condition. The message is one line that names the text, what is wrong, and where."""


@dataclass(frozen=True)
class _Field:
    path: tuple[str, ...]


_Operand = _Field | tuple[Any, ...] | str | int | float | bool
"""A field, a list of constants, or a constant."""


@dataclass(frozen=True)
class _Compare:
    left: _Operand
    sign: str
    right: _Operand


@dataclass(frozen=True)
class _Missing:
    field: _Field


@dataclass(frozen=True)
class _Flag:
    field: _Field


@dataclass(frozen=True)
class _Not:
    of: _Condition


@dataclass(frozen=True)
class _Join:
    """``decided_by``: False for `and`, True for `or`."""

    decided_by: bool
    parts: tuple[_Condition, ...]


_Condition = _Compare | _Missing | _Flag | _Not | _Join


class Where:
    """A condition on the metadata of a sample.

    Args:
        text: see the module.

    Raises:
        WhereError: it is none.
    """

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        self.text = parser.text
        """In one line."""
        self._condition = parser.condition
        self.fields = tuple(dict.fromkeys(parser.fields))
        """The paths of all fields that it names, each a tuple of keys."""
        self.canonical = repr(self._condition)
        """The same for texts that differ in spaces and brackets alone."""

    def __call__(self, metadata: Mapping[str, Any]) -> bool | None:
        """Whether a sample with these metadata is chosen; None where that is undecided, so that it is not."""
        return _holds(self._condition, metadata)


def value_of(metadata: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value of a field; None if it is not there, or null."""
    value: Any = metadata
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


class _Parser:
    """Reads a condition from a text."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"\r\n|[\r\n]", " ", text).strip()
        self.fields: list[tuple[str, ...]] = []
        if not self.text:
            raise WhereError("where: the filter is empty; leave it out, or write one like `width >= 512`")
        if len(self.text) > _MOST_CHARACTERS:
            raise WhereError(
                f"where: {len(self.text)} characters, more than {_MOST_CHARACTERS}; write a shorter filter"
            )
        try:
            with warnings.catch_warnings():  # of unknown escapes in a text
                warnings.simplefilter("ignore")
                tree = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            raise self._syntax_error(error) from None
        except (ValueError, MemoryError, RecursionError):
            raise self._error_at(0, "it cannot be read, or is nested too deeply") from None
        self._refuse_what_is_lost()
        try:
            self.condition = self._condition(tree, 0)
        except RecursionError:
            raise self._error_at(0, "it is nested too deeply") from None
        if not self.fields:
            raise WhereError(f"where {self._shown()}: it names no field of the samples' .json members")

    def _refuse_what_is_lost(self) -> None:
        """Refuse what Python's parser drops without a word: comments, and a comma between texts that is not there."""
        before = 0
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                raise self._error_at(token.start[1], "a `#` and what follows it would have no effect; leave them out")
            if token.type == before == tokenize.STRING:
                raise self._error_at(token.start[1], "two texts in a row would be one; write a comma between them")
            before = token.type

    def _condition(self, node: ast.expr, depth: int) -> _Condition:
        if depth > _MOST_NESTED:
            raise self._refused(node, "is nested too deeply")
        match node:
            case ast.BoolOp():
                parts = tuple(self._condition(part, depth + 1) for part in node.values)
                return _Join(isinstance(node.op, ast.Or), parts)
            case ast.UnaryOp(op=ast.Not()):
                return _Not(self._condition(node.operand, depth + 1))
            case ast.Compare():
                return self._comparison(node)
        operand = self._operand(node)
        if not isinstance(operand, _Field):
            raise self._refused(node, "is no condition; compare a field with it")
        return _Flag(operand)

    def _comparison(self, node: ast.Compare) -> _Condition:
        if isinstance(node.ops[0], ast.Is | ast.IsNot):
            return self._missing(node)
        pairs: list[_Condition] = []
        nodes = [node.left, *node.comparators]
        for left, sign, right in zip(nodes, node.ops, nodes[1:], strict=False):
            if type(sign) not in _COMPARISONS:
                raise self._refused(right, f"can stand after `is` alone: {_IF_MISSING}")
            pairs.append(self._pair(left, _COMPARISONS[type(sign)], right))
        return pairs[0] if len(pairs) == 1 else _Join(False, tuple(pairs))

    def _missing(self, node: ast.Compare) -> _Condition:
        right = node.comparators[0]
        if len(node.ops) > 1 or not (isinstance(right, ast.Name) and right.id == _MISSING):
            raise self._refused(right, f"cannot stand after `is`: write {_IF_MISSING}")
        field = self._operand(node.left)
        if not isinstance(field, _Field):
            raise self._refused(node.left, "is no field, so it is never missing")
        return _Missing(field) if isinstance(node.ops[0], ast.Is) else _Not(_Missing(field))

    def _pair(self, left_node: ast.expr, sign: str, right_node: ast.expr) -> _Compare:
        left = self._operand(left_node)
        if sign not in ("in", "not in"):
            return _Compare(left, sign, self._operand(right_node))
        if isinstance(right_node, ast.List | ast.Tuple):
            values = tuple(self._operand(entry) for entry in right_node.elts)
            kinds = {_kind(value) for value in values}
            if len(kinds) != 1 or kinds == {None}:
                raise self._refused(right_node, 'needs constants of one kind: [1, 2], or ["a", "b"]')
            return _Compare(left, sign, values)
        right = self._operand(right_node)
        if not isinstance(right, _Field):
            raise self._refused(right_node, f"cannot stand after `{sign}`: write a list ([1, 2]) or a field")
        return _Compare(left, sign, right)

    def _operand(self, node: ast.expr) -> _Operand:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                return constant
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
                if not isinstance(number, bool):
                    return -number if isinstance(node.op, ast.USub) else number
            case ast.Name(id=name) if name in _NAMED:
                return _NAMED[name]
            case ast.Name(id=name) if name == _MISSING:
                raise self._refused(node, f"can stand after `is` alone: {_IF_MISSING}")
            case ast.Name(id="null" | "none") | ast.Constant(value=None):
                raise self._refused(node, f"equals nothing; write FIELD is {_MISSING}")
            case ast.Name() | ast.Attribute() | ast.Call():
                path = self._path(node)
                self.fields.append(path)
                return _Field(path)
        raise self._refused(node, f"is not of the grammar of filters, which has {_GRAMMAR}")

    def _path(self, node: ast.expr) -> tuple[str, ...]:
        match node:
            # As it is written: Python's parser makes other letters of some (NFKC, such as µ).
            case ast.Name():
                return (self._written(node),)
            case ast.Attribute(value=inner):
                return (*self._path(inner), self._written(node).rpartition(".")[2].strip())
            case ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=str() as name)], keywords=[]):
                return (name,)
        raise self._refused(node, 'is no field: write its name, or field("a name") for one with other characters')

    def _written(self, node: ast.expr) -> str:
        # Positions of nodes count bytes.
        return self.text.encode()[node.col_offset : node.end_col_offset].decode(errors="replace")

    def _refused(self, node: ast.expr, why: str) -> WhereError:
        what = self._written(node)
        at = len(self.text.encode()[: node.col_offset].decode(errors="replace"))
        what = what if len(what) <= 60 else f"{what[:60]} …"
        return self._error_at(at, f"`{what}` {why}")

    def _syntax_error(self, error: SyntaxError) -> WhereError:
        at = (error.offset or 0) - 1
        if (at < 0 and error.msg == "invalid syntax") or at >= len(self.text):
            return self._error_at(len(self.text), "it ends too early")
        at = max(0, at)
        word = re.match(r"\w*", self.text[at:])
        assert word is not None
        if keyword.iskeyword(word[0]) and word[0] not in ("and", "or", "not", "in", "is"):
            return self._error_at(at, f'`{word[0]}` is a word of Python; a field of this name is field("{word[0]}")')
        why = re.split(r"[;.] | - ", error.msg or "invalid syntax")[0]
        return self._error_at(at, f"it cannot be read from `{self.text[at : at + 60]}` on ({why})")

    def _error_at(self, at: int, what: str) -> WhereError:
        return WhereError(f"where {self._shown()}: at character {max(0, at) + 1}: {what}")

    def _shown(self) -> str:
        return repr(self.text if len(self.text) <= 200 else f"{self.text[:200]} …")


def _kind(value: object) -> str | None:
    """Values of one kind can be compared; None: with nothing."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None


def _holds(condition: _Condition, metadata: Mapping[str, Any]) -> bool | None:
    match condition:
        case _Compare():
            return _compares(condition, metadata)
        case _Join():
            found: bool | None = not condition.decided_by
            for part in condition.parts:
                holds = _holds(part, metadata)
                if holds is condition.decided_by:
                    return holds
                found = None if holds is None else found
            return found
        case _Not():
            holds = _holds(condition.of, metadata)
            return None if holds is None else not holds
        case _Missing():
            return value_of(metadata, condition.field.path) is None
        case _Flag():
            value = value_of(metadata, condition.field.path)
            return value if isinstance(value, bool) else None


def _compares(pair: _Compare, metadata: Mapping[str, Any]) -> bool | None:
    left, right = (
        value_of(metadata, side.path) if isinstance(side, _Field) else side for side in (pair.left, pair.right)
    )
    kind = _kind(left)
    if kind is None:
        return None
    if pair.sign in ("in", "not in"):
        if isinstance(right, str):
            found = left in right if isinstance(left, str) else None
        elif isinstance(right, tuple):
            found = left in right if _kind(right[0]) == kind else None
        elif isinstance(right, list):
            found = any(_kind(entry) == kind and entry == left for entry in right)
        else:
            found = None
        return found if found is None or pair.sign == "in" else not found
    if kind != _kind(right) or (kind == "bool" and pair.sign not in ("==", "!=")):
        return None
    return _FUNCTIONS[pair.sign](left, right)
