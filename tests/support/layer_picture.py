"""The layers of the package as a section of a document: a picture, and a table of the allowed imports."""

from __future__ import annotations

from collections.abc import Mapping, Set

BEGIN, END = "<!-- layers: written by python -m tests.test_layering -->", "<!-- end of layers -->"


def with_section(text: str, section: str) -> str:
    """Return `text` with `section` between BEGIN and END. Raises ValueError if `text` does not have both."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN} ... {END} in the document")
    return f"{before}{BEGIN}\n{section}{end}{after}"


def shown(layers: Mapping[str, Mapping[str, str]], allowed: Mapping[str, Set[str]]) -> str:
    """Return Markdown: a Mermaid flowchart of the layers, top first, and a table of what each package may import.

    The first layer is one box without arrows, because nearly every package uses it. The picture leaves out arrows that
    a path of other arrows implies. The table has "everything below" for a package that may import all lower layers.
    """
    (foundation, low), *upper = layers.items()
    return "\n".join([*_picture(foundation, low, upper, allowed), "", *_table(layers, allowed), ""])


def _picture(foundation: str, low: Mapping[str, str], upper: list, allowed: Mapping[str, Set[str]]) -> list[str]:
    lines = ["```mermaid", "flowchart TB"]
    for number, (title, packages) in reversed(list(enumerate(upper))):
        lines.append(f'  subgraph layer{number} ["{title}"]')
        lines += [f'    {_node(package)}["{_name(package)}"]' for package in packages]
        lines.append("  end")
    lines += [
        f'  subgraph base ["{foundation}: for every package"]',
        f'    {foundation}["{", ".join(_name(package) for package in low if "." not in package)}"]',
        "  end",
    ]
    arrows = {package: allowed[package] - low.keys() for _, packages in upper for package in packages}
    for package, names in reversed(arrows.items()):
        direct = names - {below for name in names for below in arrows[name]}
        if direct:
            lines.append(f"  {_node(package)} --> {' & '.join(_node(name) for name in sorted(direct))}")
    return [*lines, f"  layer0 ~~~ {foundation}", "```"]


def _table(layers: Mapping[str, Mapping[str, str]], allowed: Mapping[str, Set[str]]) -> list[str]:
    lines = ["| layer | package | may import |", "|---|---|---|"]
    for title, packages in reversed(layers.items()):
        for package in reversed(packages):
            everything = packages[package] == "*"
            names = "everything below" if everything else ", ".join(f"`{_name(n)}`" for n in sorted(allowed[package]))
            lines.append(f"| {title} | `{_name(package)}` | {names or 'nothing'} |")
            title = ""
    return lines


def _name(package: str) -> str:
    return package.replace(".", "/")


def _node(package: str) -> str:
    return package.replace(".", "_")
