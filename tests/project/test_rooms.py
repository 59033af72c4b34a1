"""The package as a house: which room may know which, and how large its files and functions may be."""

import ast
from pathlib import Path

import pytest
from count_code import code_lines, functions
from rooms import ROOMS, circles, foreign_names, imports, room_of, sources

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sadp_fast"

MOST_CODE_LINES = 9_660  # 10,293 before there were rooms; the aim is 8,100
MOST_LINES_OF_A_FILE = 500
MOST_CODE_LINES_OF_A_FUNCTION = 60
KERNELS = "kernels.py"  # as long as the equations that they hold

# Names with an underscore that belong to no module of ours, and why there is no public one in their place.
ALLOWED = {
    "_C": "torch's compiled part: the current stream and the dispatch stack are nowhere else",
    "_autograd": "of torch._C: what becomes of saved tensors",
    "_top_saved_tensors_default_hooks": "of torch._C._autograd: the hooks themselves, with no public name",
    "_current_graph_task_id": "of torch._C: whether a backward pass runs, in which checkpoints recompute",
    "_cuda_getCurrentRawStream": "of torch._C: a tenth of torch.cuda.current_stream's time",
    "_len_torch_dispatch_stack": "of torch._C: whether another mode watches",
    "_current_level": "of torch.autograd.forward_ad: whether forward mode is on",
    "_version": "of a tensor: how often it was written to",
    "_base": "of a tensor: what it is a view of",
    "_parameters": "of a module: a parameter is replaced without its checks, and put back",
    "_foreach_copy_": "of torch: one launch for many tensors",
    "_new_with_weak_ptr": "of a storage: whether two tensors share it",
    "_saved_dim0": "of a node of the autograd graph",
    "_saved_dim1": "of a node of the autograd graph",
    "_saved_dims": "of a node of the autograd graph",
    "_reversed_padding_repeated_twice": "of a convolution: its padding as torch.nn.functional.pad takes it",
    "_BatchNorm": "of torch.nn: the class of every batch normalisation",
    "_replace": "of a named tuple, where the underscore only keeps it apart from fields",
}

TREES = sources(PACKAGE)
GRAPH = imports(PACKAGE.name, TREES)


def test_every_file_is_in_a_room():
    assert {room_of(file) for file in TREES} == set(ROOMS)


def test_imports_go_down():
    level = {room: number for number, room in enumerate(ROOMS)}
    up = [
        f"{file}:{line} imports {other}"
        for file, others in GRAPH.items()
        for other, line in others.items()
        if level[room_of(other)] < level[room_of(file)]
    ]
    assert not up


# BatchNorm + LIF is LIF behind a normalisation: its reference and its variant by steps are LIF's.
BUILT_ON = {("batch_norm_lif", "lif")}
# Classes with attributes of another's making, and why.
FORWARDING = {"PrunedLoader": "whatever else one asks a DataLoader for"}


def test_operators_do_not_know_each_other():
    operators = {file: others for file, others in GRAPH.items() if room_of(file) == "ops" and file.count("/") > 1}
    across = [
        f"{file}:{line} imports {other}"
        for file, others in operators.items()
        for other, line in others.items()
        if room_of(other) == "ops"
        and other.split("/")[1] != file.split("/")[1]
        and (file.split("/")[1], other.split("/")[1]) not in BUILT_ON
    ]
    assert operators and not across


def test_no_circle():
    assert circles(GRAPH) == []


def test_nothing_imports_the_laboratory_but_its_alias():
    outside = {file for file, others in GRAPH.items() if any(room_of(other) == "lab" for other in others)}
    assert {file for file in outside if room_of(file) != "lab"} == {"models.py"}


def test_no_module_touches_what_is_anothers_own():
    touched = [(file, line, text) for file, tree in TREES.items() for line, text in foreign_names(tree)]
    name_of = {text: text.replace("import ", ".").rsplit(".", 1)[-1] for _, _, text in touched}
    assert [f"{file}:{line} {text}" for file, line, text in touched if name_of[text] not in ALLOWED] == []
    assert set(ALLOWED) <= set(name_of.values())  # what is gone from the code goes here too


def test_no_class_makes_up_its_attributes():
    found = [
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name in ("__getattr__", "__getattribute__")
    ]
    assert sorted(found) == sorted(FORWARDING)


def test_no_file_is_long():
    lines = {file: len((PACKAGE / file).read_text().splitlines()) for file in TREES}
    assert {file: n for file, n in lines.items() if n > MOST_LINES_OF_A_FILE and Path(file).name != KERNELS} == {}


def test_no_function_is_long():
    lines = {
        f"{file}:{function}": n
        for file in TREES
        if Path(file).name != KERNELS
        for function, n in functions((PACKAGE / file).read_text()).items()
    }
    assert {function: n for function, n in lines.items() if n > MOST_CODE_LINES_OF_A_FUNCTION} == {}


def test_the_package_is_small():
    assert sum(len(code_lines((PACKAGE / file).read_text())) for file in TREES) <= MOST_CODE_LINES


def test_the_folders_of_tests_are_the_rooms():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {*(room for room in ROOMS if not room.endswith(".py")), "project"}


# ------------------------------------------------------------------------------------ that the checks find something


def package(**files: str) -> dict[str, ast.Module]:
    return {name.replace("__", "/") + ".py": ast.parse(text) for name, text in files.items()}


@pytest.mark.parametrize(
    "text",
    [
        "from ..b import two",
        "from ..b.two import name",
        "import p.b.two",
        "from p.b import two as other",
        "def f():\n    from ..b.two import name",
        "if TYPE_CHECKING:\n    from ..b.two import name",
    ],
)
def test_imports_are_found_wherever_they_are(text):
    trees = package(a__one=text, b__two="name = 1")
    assert set(imports("p", trees)["a/one.py"]) == {"b/two.py"}


def test_circles_are_found():
    graph = imports(
        "p", package(a="from . import b", b="from . import c", c="def f(): from .a import x", d="import p.a")
    )
    assert [sorted(group) for group in circles(graph)] == [["a.py", "b.py", "c.py"]]
    assert circles(imports("p", package(a="from . import b, c", b="from . import c", c=""))) == []


def test_what_is_anothers_own_is_found():
    text = "from .x import _taken\nclass A:\n    def f(self): self._own = other._own; self._new(); return other._his\n"
    assert [what for _, what in foreign_names(ast.parse(text))] == ["import _taken", "other._his"]
