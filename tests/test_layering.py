"""Packages import only packages below them. The table ALLOWED lists these; docs/design.md shows it.

After a change of the table, `python -m tests.test_layering` writes it into docs/design.md, and lists allowed imports
that no package uses.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.imports import Import, Sources, cycles, violations
from tests.support.layer_picture import shown, with_section

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs/design.md"
EVERYTHING = "*"  # all packages of the layers below, and earlier ones of its own layer

# From the bottom up. A package may import those named after it. Folders and files of respec_trainer/ by dotted path; a
# folder inside a package counts as a package of its own.
LAYERS: dict[str, dict[str, str]] = {
    "foundation": {
        "errors": "",
        "registry": "errors",
        "dtypes": "errors",
        "network": "errors",
        "processes": "errors",
        "collectives": "errors",
        "capture": "",
        "config": "errors",
        "rollout.sglang.inside.cpu.stand_in.sgl_kernel": "",
    },
    "processes and configuration": {
        "speculation.algorithms": "config errors registry",
        "config_file": "config errors speculation.algorithms",
        "placement": "config errors",
        "compat": "errors",
        "launchers": "errors",
        "interrupt": "errors processes",
        "supervise": "errors processes",
        "command_line": "errors processes",
        "hosts": "collectives errors processes",
        "watchdog": "config errors interrupt processes",
    },
    "contracts": {
        "rollout": "errors",
        "data": "config errors",
        "models": "config errors registry",
        "weights": "dtypes errors models",
        "objective": "config errors registry rollout",
        "rewards": "collectives config data errors registry rollout",
    },
    "mechanisms": {
        "checkpoint": "collectives config config_file dtypes errors models weights",
        "speculation": "errors rollout speculation.algorithms",
        "drafter": "capture compat dtypes errors models weights",
    },
    "parts": {
        "speculation.profiling": "config errors rollout speculation speculation.algorithms",
        "speculation.simulation": "config errors rollout speculation speculation.profiling",
        "drafter.online": "capture collectives config drafter errors rollout speculation.algorithms",
        "rollout.sglang.inside.cpu": "errors",
        "rollout.sglang.inside": "compat errors models rollout rollout.sglang.inside.cpu",
        "rollout.sglang": "compat config drafter dtypes errors models network processes rollout rollout.sglang.inside "
        "rollout.sglang.inside.cpu speculation.algorithms weights",
        "actor": "capture checkpoint collectives compat config dtypes errors models objective placement processes "
        "rollout weights",
    },
    "parts of many ranks": {
        "rollout.remote": "config errors hosts placement rollout rollout.sglang",
        "rollout.fleet": "collectives config errors placement rollout rollout.remote",
        "resync": "collectives config dtypes errors models rollout weights",
        "convert": "actor checkpoint drafter dtypes errors models weights",
        "telemetry": "collectives config config_file errors registry rewards rollout speculation "
        "speculation.algorithms speculation.simulation",
        "plan": "config drafter drafter.online dtypes errors models placement processes resync "
        "speculation.algorithms speculation.profiling weights",
    },
    "uses of the parts": {
        "export": "checkpoint convert errors resync weights",
        "generation": "collectives errors resync rollout rollout.fleet rollout.remote",
        "preflight": "actor checkpoint compat config data drafter dtypes errors models network objective plan "
        "rewards speculation.algorithms speculation.profiling telemetry",
        "audit": "actor collectives compat config config_file data drafter drafter.online errors network preflight "
        "resync rollout rollout.sglang speculation.algorithms",
        "recipes": "checkpoint compat config data drafter dtypes errors models rewards rollout rollout.sglang",
    },
    "a run": {
        "job": EVERYTHING,
        "trainer": EVERYTHING,
    },
}


def allowed() -> dict[str, set[str]]:
    """Return all packages, from the bottom up, and the packages that each may import."""
    table: dict[str, set[str]] = {}
    for layer in LAYERS.values():
        for package, names in layer.items():
            table[package] = set(table) if names == EVERYTHING else set(names.split())
    return table


ALLOWED = allowed()


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT / "respec_trainer")


@pytest.fixture(scope="module")
def imports(sources) -> list[Import]:
    return sources.imports()


def test_packages_import_only_what_the_table_allows(imports):
    found = violations(imports, ALLOWED)
    assert not found, "\n" + "\n".join(found) + "\n(the rule is ALLOWED in tests/test_layering.py)"


def test_no_packages_import_each_other(imports):
    found = cycles(imports)
    assert not found, "\n" + "\n".join(found)


def test_every_package_has_a_line_in_the_table(sources):
    assert sources.packages() <= ALLOWED.keys()


def test_the_table_allows_only_what_stands_before_in_it():
    """The order excludes cycles, and no arrow goes up."""
    order = list(ALLOWED)
    wrong = [(a, b) for a, names in ALLOWED.items() for b in names if b not in order[: order.index(a)]]
    assert not wrong


def test_only_the_loop_and_its_builder_know_everything():
    everything = [name for layer in LAYERS.values() for name, names in layer.items() if names == EVERYTHING]
    assert everything == ["job", "trainer"]
    most = max(len(ALLOWED[name]) for name in ALLOWED if name not in everything)
    assert most < len(ALLOWED) / 2


def test_our_side_of_an_engine_touches_the_inside_only_where_its_processes_start(imports):
    """Code of both sides is in `rollout`; workers.py runs first inside sglang's processes."""
    inside = [one for one in imports if one.imported.startswith("rollout.sglang.inside")]
    outside = [one for one in inside if not one.importer.startswith("rollout.sglang.inside")]
    assert {one.file for one in outside} == {"respec_trainer/rollout/sglang/workers.py"}


def test_the_package_imports_nothing_of_the_folders_around_it(sources):
    """Scripts, benchmarks and tests import the package; it never imports them."""
    around = {"launch", "tools", "benchmarks", "tests"}
    wrong = []
    for path in sources.files.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{path}:{node.lineno} imports {name}" for name in names if name.split(".")[0] in around]
    assert not wrong


def test_the_design_document_shows_this_table():
    text = DESIGN.read_text()
    assert with_section(text, shown(LAYERS, ALLOWED)) == text, "run: python -m tests.test_layering"


def test_the_picture_leaves_out_only_arrows_that_others_imply():
    """Every arrow drawn is allowed, and the arrows reach every package that may be imported above the foundation."""
    nodes = {name.replace(".", "_"): name for name in ALLOWED}
    drawn: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for line in shown(LAYERS, ALLOWED).splitlines():
        left, arrow, right = line.strip().partition(" --> ")
        if arrow:
            drawn[nodes[left]] |= {nodes[name] for name in right.split(" & ")}
    reached: dict[str, set[str]] = {}
    for package in ALLOWED:  # from the bottom up
        reached[package] = drawn[package].union(*(reached[name] for name in drawn[package]))
    for package in ALLOWED.keys() - LAYERS["foundation"].keys():
        assert drawn[package] <= ALLOWED[package]
        assert ALLOWED[package] - LAYERS["foundation"].keys() <= reached[package]


def unused(sources: Sources) -> list[str]:
    """Return entries of the table without use: packages that do not exist, and arrows without an import."""
    used = {(one.importer, one.imported) for one in sources.imports()}
    gone = [f"there is no {name}" for name in ALLOWED if name not in sources.packages()]
    listed = [name for name, names in ALLOWED.items() if name not in ("job", "trainer") and name in sources.packages()]
    return gone + [f"{a} never imports {b}" for a in listed for b in sorted(ALLOWED[a]) if (a, b) not in used]


if __name__ == "__main__":
    DESIGN.write_text(with_section(DESIGN.read_text(), shown(LAYERS, ALLOWED)))
    print(*unused(Sources(ROOT / "respec_trainer")), sep="\n")
