"""The changes that a mutation run plants: for each kind of syntax node, the texts that may take its place.

Each stands for a mistake that people make: a wrong bound, a dropped condition, guard, statement or argument, another
default, the other of two similar functions, statements in another order, another type of exception.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Texts = Iterator[str]

COMPARED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
COMPARED |= {ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
COMPUTED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*"}
COMPUTED |= {ast.LShift: ">>", ast.RShift: "<<", ast.BitOr: "&", ast.BitAnd: "|", ast.BitXor: "|"}
PAIRS = "min max,any all,amin amax,argmin argmax,floor ceil,startswith endswith,partition rpartition,minimum maximum,"
PAIRS += "removeprefix removesuffix,lstrip rstrip,largest smallest,is_file is_dir"
SIMILAR = {a: b for pair in PAIRS.split(",") for a, b in (pair.split(), pair.split()[::-1])}
SIMILAR |= {"zip_longest": "zip"}
# Methods without arguments; the object itself takes the call's place.
UNWRAPPED = {"strip", "rstrip", "lower", "resolve", "absolute", "copy", "detach", "clone", "contiguous", "flatten"}
UNWRAPPED |= {"long", "double", "float", "abs", "exp", "log"}
UNNEEDED = {"sorted", "reversed", "abs", "set"}  # functions whose first argument takes the call's place


def texts_for(node: ast.AST) -> Texts:
    """Yield the texts that may take the place of `node`."""
    for kind, change in CHANGES:
        if isinstance(node, kind):
            yield from change(node)


def swapped(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, ast.stmt]]:
    """Yield the pairs of neighbors in `body` that are calls: their order may be wrong."""
    for first, second in zip(body, body[1:], strict=False):
        calls = _is_call(first) and _is_call(second) and ast.unparse(first) != ast.unparse(second)
        if calls and not (_fills(first) and _fills(second)):
            yield first, second


def _compare(node: ast.Compare) -> Texts:
    sides = [f"({ast.unparse(side)})" for side in (node.left, *node.comparators)]
    signs = [next(sign for kind, sign in _SIGNS.items() if isinstance(op, kind)) for op in node.ops]
    for place, op in enumerate(node.ops):
        changed = [*signs[:place], COMPARED[type(op)], *signs[place + 1 :]]
        yield f"({sides[0]}" + "".join(f" {s} {side}" for s, side in zip(changed, sides[1:], strict=True)) + ")"


_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is"}
_SIGNS |= {ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}


def _boolean(node: ast.BoolOp) -> Texts:
    parts = [f"({ast.unparse(value)})" for value in node.values]
    here, there = (" and ", " or ") if isinstance(node.op, ast.And) else (" or ", " and ")
    yield f"({there.join(parts)})"
    for place in range(len(parts)):
        yield f"({here.join(parts[:place] + parts[place + 1 :])})"


def _binary(node: ast.BinOp) -> Texts:
    texts = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)
    joins = any(isinstance(side, texts) or _is_text(side) for side in (node.left, node.right))
    if type(node.op) in COMPUTED and not (joins and isinstance(node.op, ast.Add | ast.Mod | ast.Div)):
        yield f"(({ast.unparse(node.left)}) {COMPUTED[type(node.op)]} ({ast.unparse(node.right)}))"


def _augmented(node: ast.AugAssign) -> Texts:
    yield "pass"
    if type(node.op) in COMPUTED and not isinstance(node.value, ast.JoinedStr) and not _is_text(node.value):
        yield f"{ast.unparse(node.target)} {COMPUTED[type(node.op)]}= {ast.unparse(node.value)}"


def _constant(node: ast.Constant) -> Texts:
    value = node.value
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield from (str(value + 1), *([f"({value - 1})"] if value > 0 else []))
    elif isinstance(value, float):
        yield repr(2 * value if value else 1.0)


def _unary(node: ast.UnaryOp) -> Texts:
    if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield f"({ast.unparse(node.operand)})"


def _call(node: ast.Call) -> Texts:
    for keyword in node.keywords:
        others = [other for other in node.keywords if other is not keyword]
        if keyword.arg is not None and ast.unparse(keyword) != "strict=False":  # which is the default
            yield ast.unparse(ast.Call(node.func, node.args, others))
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in SIMILAR:
        yield _renamed(node)
    if isinstance(node.func, ast.Attribute) and name in UNWRAPPED and not node.args and not node.keywords:
        yield f"({ast.unparse(node.func.value)})"
    if isinstance(node.func, ast.Name) and name in UNNEEDED and node.args:
        yield f"list({ast.unparse(node.args[0])})" if name != "abs" else f"({ast.unparse(node.args[0])})"


def _renamed(node: ast.Call) -> str:
    """Return the call with the other function of a pair; zip has no fillvalue and is given none."""
    function = node.func
    if isinstance(function, ast.Attribute):
        other: ast.expr = ast.Attribute(function.value, SIMILAR[function.attr])
    else:
        other = ast.Name(SIMILAR[function.id])
    keywords = [keyword for keyword in node.keywords if keyword.arg != "fillvalue"]
    return ast.unparse(ast.Call(other, node.args, keywords))


def _statement(node: ast.stmt) -> Texts:
    if _is_call(node) or isinstance(node, ast.Raise | ast.Delete):
        yield "pass"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript | ast.Tuple):
        yield "pass"


def _raise(node: ast.Raise) -> Texts:
    if isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
        other = "ValueError" if node.exc.func.id == "RuntimeError" else "RuntimeError"
        yield f"raise {other}{ast.unparse(node.exc).removeprefix(node.exc.func.id)}"


def _return(node: ast.Return) -> Texts:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield "return None"


def _ternary(node: ast.IfExp) -> Texts:
    yield f"({ast.unparse(node.body)})"
    yield f"({ast.unparse(node.orelse)})"


def _sliced(node: ast.Slice) -> Texts:
    parts = [node.lower, node.upper, node.step]
    for place, part in enumerate(parts):
        if part is not None:
            left = [None if place == other else value for other, value in enumerate(parts)]
            yield ast.unparse(ast.Slice(*left)) or ":"


def _is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _fills(node: ast.Expr) -> bool:
    """Return whether the call is of a tensor's method such as copy_: calls that fill two tensors may change places."""
    return isinstance(node.value.func, ast.Attribute) and node.value.func.attr.endswith("_")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


CHANGES: list[tuple[type, Callable]] = [
    (ast.Compare, _compare), (ast.BoolOp, _boolean), (ast.BinOp, _binary), (ast.AugAssign, _augmented),
    (ast.Constant, _constant), (ast.UnaryOp, _unary), (ast.Call, _call), (ast.stmt, _statement), (ast.Raise, _raise),
    (ast.Return, _return), (ast.IfExp, _ternary), (ast.Slice, _sliced),
    (ast.Break, lambda node: iter(["continue"])), (ast.Continue, lambda node: iter(["break"])),
]  # fmt: skip
