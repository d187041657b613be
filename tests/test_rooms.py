"""Does every line of code stand in the room where its subject belongs? What import-linter cannot
see, read from the syntax trees.

Comments and docstrings are prose and may name anything. Each rule finds places in a tree; its test
names the rooms in which such a place is at home.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_in(1)

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "calipers"
LONGEST_FILE = 450  # lines of code: without blank ones, comments and docstrings
# whoever doubts everything else reads this one file, and it alone
LONGER = {"record/checker.py": 1000}

Place = tuple[int, str]  # line, what stands there
Rule = Callable[[ast.Module], Iterator[Place]]


# ---- reading code
# --------------------------------------------------------------------------------------------------


def tree_of(path: Path) -> ast.Module:
    """Return the whole tree of a file; a syntax error names the file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def code_of(tree: ast.Module) -> ast.Module:
    """Return the tree without its prose: strings that stand alone as a statement; comments are not
    in it anyway.
    """

    class Silent(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            is_prose = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            return ast.copy_location(ast.Pass(), node) if is_prose else self.generic_visit(node)

    return Silent().visit(tree)


def dotted(node: ast.AST) -> str:
    """Return `torch.nn.functional.pad` for that expression; what is not a plain name counts as
    `?`.
    """
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call in the tree with the dotted name of what is called."""
    return ((node, dotted(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string constant in the tree."""
    return (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that code gives or uses, and every string that could be one
    (`aten.relu.default`).
    """
    for node in ast.walk(tree):
        match node:
            case (
                ast.Name(id=name)
                | ast.Attribute(attr=name)
                | ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.alias(name=name, asname=other):
                yield node.lineno, name
                yield node.lineno, other or name
            case ast.Constant(value=str(text)) if re.fullmatch(r"[\w.:]+", text):
                yield node.lineno, text


def files() -> list[Path]:
    """Every source file that exists."""
    return sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    """Return `threats/norms.py` for that file."""
    return path.relative_to(SRC).as_posix()


def strangers(rule: Rule, *at_home: str, only: tuple[str, ...] = ("",)) -> list[str]:
    """Return every place outside the rooms `at_home` (files, or folders ending in a slash), looking
    only into the rooms that begin with `only`.
    """
    found = []
    for path in files():
        room = room_of(path)
        if not room.startswith(at_home or ("/",)) and room.startswith(only):
            found += [
                f"{path.relative_to(ROOT)}:{line}: {what}"
                for line, what in rule(code_of(tree_of(path)))
            ]
    return found


def report(found: list[str], advice: str) -> str:
    """Return what pytest shows: each place on its line, and where it belongs."""
    return "\n".join([advice, *found])


# ---- the rules
# --------------------------------------------------------------------------------------------------

NORMS = {"linf", "l1", "l2", "l0"}
OPS = re.compile(
    r"relu|gelu|silu|sigmoid|maxpool|max_pool|(?<![a-z])conv([1-3]d|olution|_transpose)?(?![a-z])",
    re.IGNORECASE,
)
KNOWN_TOOLS = set(
    "FGSM OneStep PGD APGD FAB FMN DDN DeepFool CarliniWagner Square HopSkipJump BoundaryAttack SPSA "
    "Transfer "
    "SubstitutionSearch IBP Intervals CROWN AlphaCROWN BranchAndBound MILP Smoothing Lipschitz".split()
)
ON_DISK = set(
    "open io.open os.open gzip.open sqlite3.connect np.load np.save np.savez np.savez_compressed "
    "numpy.load numpy.save torch.load torch.save load_file save_file os.remove os.rename "
    "os.replace os.unlink os.mkdir os.makedirs".split()
)
ON_DISK_METHODS = {
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "rmdir",
    "touch",
}
DRAWS = set(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal "
    "poisson".split()
)
DRAWS_IN_PLACE = set(
    "uniform_ normal_ random_ bernoulli_ exponential_ log_normal_ cauchy_ geometric_".split()
)
KEEPS_STATE = {"torch.random.fork_rng", "torch.random.get_rng_state", "torch.random.set_rng_state"}


def knows_p(tree: ast.Module) -> Iterator[Place]:
    """Branches on the name of a norm, or computes one."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        match node:
            case ast.Compare(left=left, comparators=others):
                parts = [left, *others]
            case ast.MatchValue(value=value):
                parts = [value]
            case ast.Dict(keys=keys):
                parts = [*keys]
        for text in (
            text for part in parts if part for text in strings(part) if text.value in NORMS
        ):
            yield text.lineno, f"branches on {text.value!r}"
    for node, name in calls(tree):
        if name.rpartition(".")[2] in ("norm", "vector_norm") and "." in name:
            yield node.lineno, f"computes a norm by {name}"


def decides_adversarial(tree: ast.Module) -> Iterator[Place]:
    """Compares a predicted class with something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            name.endswith(".argmax")
            for part in (node.left, *node.comparators)
            for _, name in calls(part)
        ):
            yield node.lineno, "compares an argmax"


def names_an_op(tree: ast.Module) -> Iterator[Place]:
    """Uses the name of a layer or of an operation of a network."""
    return (
        (line, f"names the operation {name}")
        for line, name in identifiers(tree)
        if OPS.search(name)
    )


def names_a_tool(tree: ast.Module) -> Iterator[Place]:
    """Imports, makes or compares with a concrete tool that is not defined here."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return (
        (line, f"names the tool {name}")
        for line, name in identifiers(tree)
        if name.rpartition(".")[2] in tools() - own
    )


@cache
def tools() -> frozenset[str]:
    """Return the field's usual names, and every class of the two jaws that can be called with a
    problem; a protocol is no tool but what one must be.
    """
    trees = [
        tree_of(path) for path in files() if room_of(path).startswith(("attacks/", "certificates/"))
    ]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    concrete = [
        node
        for node in classes
        if not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
    ]
    return frozenset(
        KNOWN_TOOLS.union(
            node.name for node in concrete if any(takes_a_problem(member) for member in node.body)
        )
    )


def takes_a_problem(member: ast.stmt) -> bool:
    """Is it `def __call__(self, problem, ...)`, by which a tool is recognised?"""
    return (
        isinstance(member, ast.FunctionDef)
        and member.name == "__call__"
        and "problem" in [a.arg for a in member.args.args]
    )


OP_CLASSES = set(
    "Op Affine Elementwise Windowed Linear Conv Scale Sum Generic TwoPieces Clip Smooth Wave "
    "MaxPool Product MatMul LogSumExp Inside Cut".split()
)


def asks_what_an_op_is(tree: ast.Module) -> Iterator[Place]:
    """Tells operations of a graph apart by their class, or feels for an attribute."""
    for node, name in calls(tree):
        if name == "isinstance":
            classes = {dotted(n) for n in ast.walk(node.args[1])}
            if classes & OP_CLASSES:
                yield node.lineno, "asks for the class of an operation"
        elif name in ("hasattr", "getattr"):
            whose = dotted(node.args[0])
            if whose == "op" or whose.endswith(".op"):
                yield node.lineno, f"calls {name} on an operation"


def touches_the_disk(tree: ast.Module) -> Iterator[Place]:
    """Opens, reads or writes a file."""
    for node, name in calls(tree):
        method = name.rpartition(".")[2]
        modes = [*node.args, *(keyword.value for keyword in node.keywords)]
        opened = method == "open" and any(
            re.fullmatch(r"[rwabx+t]+|utf-?8", text.value)
            for part in modes
            for text in strings(part)
        )
        if (
            name in ON_DISK
            or method in ON_DISK_METHODS
            or opened
            or name.startswith(("shutil.", "tempfile."))
        ):
            yield node.lineno, f"calls {name}"


def prints(tree: ast.Module) -> Iterator[Place]:
    """Writes to the terminal."""
    for node, name in calls(tree):
        if name in ("print", "rich.print", "sys.stdout.write", "sys.stderr.write") or name.endswith(
            "console.print"
        ):
            yield node.lineno, f"calls {name}"


def draws_globally(tree: ast.Module) -> Iterator[Place]:
    """Draws from, or seeds, a generator that everybody shares."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and "random" in (
            getattr(node, "module", None),
            *(alias.name for alias in node.names),
        ):
            yield node.lineno, "imports random"
        if (
            isinstance(node, ast.Attribute)
            and re.match(r"(np|numpy|torch)\.random\.", dotted(node))
            and dotted(node) not in KEEPS_STATE
        ):
            yield node.lineno, f"uses {dotted(node)}"
    for node, name in calls(tree):
        module, _, function = name.rpartition(".")
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        if name in ("torch.manual_seed", "torch.seed") or (
            not given and ((module == "torch" and function in DRAWS) or function in DRAWS_IN_PLACE)
        ):
            yield node.lineno, f"calls {name} without a generator"


def waits_in_a_loop(tree: ast.Module) -> Iterator[Place]:
    """Fetches one number at a time from the device."""
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For | ast.While | ast.comprehension):
            yield from (
                (node.lineno, "calls .item() in a loop")
                for node, name in calls(loop)
                if name.endswith(".item") and not node.args
            )


def imports_distributed(tree: ast.Module) -> Iterator[Place]:
    """Uses torch.distributed, which import-linter cannot tell from torch."""
    for node in ast.walk(tree):
        named = [getattr(node, "module", None) or ""] + [
            alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)
        ]
        if dotted(node) == "torch.distributed" or any(
            name.startswith("torch.distributed") for name in named
        ):
            yield node.lineno, "uses torch.distributed"


def undocumented(tree: ast.Module, known: frozenset[str] = frozenset()) -> Iterator[Place]:
    """Defines something public without a docstring; a method named in `known` is explained where
    its interface is.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            members = [
                m
                for m in getattr(node, "body", [])
                if isinstance(node, ast.ClassDef) and isinstance(m, ast.FunctionDef)
            ]
            open_members = [
                m for m in members if not m.name.startswith("_") and m.name not in known
            ]
            yield from (
                (n.lineno, f"{n.name} has no docstring")
                for n in [node, *open_members]
                if not ast.get_docstring(n)
            )


def documented_methods(tree: ast.Module) -> set[str]:
    """Return the names of all methods that have a docstring."""
    methods = (
        m
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for m in node.body
        if isinstance(m, ast.FunctionDef)
    )
    return {m.name for m in methods if ast.get_docstring(m)}


# ---- each line in its room
# --------------------------------------------------------------------------------------------------


def test_only_norms_knows_p() -> None:
    # which shares nothing with what it checks
    found = strangers(knows_p, "threats/norms.py", "record/checker")
    assert not found, report(
        found, "What depends on the norm is a method of the norm: it belongs in threats/norms.py."
    )


def test_only_goals_decides_what_is_adversarial() -> None:
    found = strangers(decides_adversarial, "problem/goals.py")
    assert not found, report(
        found,
        "Whether a point is adversarial is read from its margins: it belongs in problem/goals.py.",
    )


def test_only_graph_names_an_op() -> None:
    # A file that builds a network from its description, or rearranges one, or takes its last layer
    # off, names layers, not operations to be bounded.
    found = strangers(
        names_an_op,
        "graph/",
        "data/__init__.py",
        "interchange/",
        "models/adapters.py",
        "models/fast_gradient.py",
        "conv_gradient.py",
        "record/checker",
    )
    assert not found, report(
        found,
        "Say what is needed of the operation (its lines, breakpoints, adjoint); its name belongs "
        "in graph/.",
    )


def test_only_graph_asks_what_an_op_is() -> None:
    # the checker's operations and those of files are others, which share nothing with the graph's
    found = strangers(asks_what_an_op_is, "graph/", "interchange/", "record/checker.py")
    assert not found, report(
        found,
        "Declare what is needed as a fact of `Op` (graph/kinds.py), with a default that is true of "
        "any operation.",
    )


def test_only_presets_names_a_tool() -> None:
    found = strangers(
        names_a_tool,
        "presets.py",
        "renamed.py",
        "__init__.py",
        "attacks/__init__.py",
        "certificates/__init__.py",
    )
    assert not found, report(
        found, "Receive the tool as an argument; which one it is belongs in presets.py."
    )


def test_only_four_doors_touch_the_disk() -> None:
    found = strangers(
        touches_the_disk,
        "record/database.py",
        "report/render.py",
        "interchange/",
        "cli/",
        "data/__init__.py",
        "record/checker.py",
    )
    assert not found, report(
        found,
        "Files belong in record/database.py (evidence), report/render.py (pages), interchange/, cli/ "
        "and data/.",
    )


def test_only_the_command_line_prints() -> None:
    found = strangers(
        prints,
        "cli/",
        "api/display.py",  # where it was asked to, progress=True
        "record/checker.py",  # a program of its own
    )
    assert not found, report(
        found,
        "Return the text, or call the progress function that was handed in; printing belongs in "
        "cli/.",
    )


def test_nobody_draws_from_a_shared_generator() -> None:
    found = strangers(draws_globally)
    assert not found, report(
        found,
        "Draw from the streams or the generator that came as an argument (random_streams.py).",
    )


def test_no_device_is_waited_for_in_an_inner_loop() -> None:
    found = strangers(waits_in_a_loop, only=("attacks/", "bounds/"))
    assert not found, report(
        found, "Keep it a tensor, and fetch all numbers at once after the loop."
    )


def test_the_core_is_not_distributed() -> None:
    found = strangers(
        imports_distributed, only=("problem/", "attacks/", "graph/", "bounds/", "certificates/")
    )
    assert not found, report(found, "Spreading work over machines belongs in measurement/.")


def lines_of_code(path: Path) -> int:
    """Return how many lines a file has that are not blank, a comment or part of a docstring."""
    text = path.read_text(encoding="utf-8")
    told = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = (line.strip() for line in text.splitlines())
    return sum(
        bool(line) and not line.startswith("#") and k not in told
        for k, line in enumerate(lines, start=1)
    )


def test_files_are_short_enough_to_read() -> None:
    lengths = {path: lines_of_code(path) for path in files()}
    found = [
        f"{path.relative_to(ROOT)}:{n}: {n} lines of code"
        for path, n in lengths.items()
        if n > LONGER.get(path.relative_to(SRC).as_posix(), LONGEST_FILE)
    ]
    assert not found, report(
        found, f"A file has at most {LONGEST_FILE} lines of code: split it where an idea ends."
    )


def test_every_module_begins_with_a_sentence() -> None:
    openings = {path: (ast.get_docstring(tree_of(path)) or "").split("\n\n")[0] for path in files()}
    found = [
        f"{path.relative_to(ROOT)}:1: {line or 'no docstring'}"
        for path, line in openings.items()
        if not line.endswith(".")
    ]
    assert not found, report(
        found, "The first sentence says what the module holds or does; it ends with a period."
    )


def test_everything_public_is_documented() -> None:
    trees = {path: tree_of(path) for path in files()}
    known = frozenset().union(*map(documented_methods, trees.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path, tree in trees.items()
        for line, what in undocumented(tree, known)
    ]
    assert not found, report(
        found,
        "A docstring says what comes back; a method that implements an interface may leave it to "
        "the interface.",
    )


# for users, though nothing here calls them
FOR_USERS = {"merge", "largest_mse", "gradient_bound", "to_frame"}
# called by the solver that they are handed to, or in a process of its own
CALLED_FROM_OUTSIDE = {"eventinit", "eventexec", "serve"}


def defined(tree: ast.Module) -> Iterator[Place]:
    """Yield what is public and not decorated by a call, which registers it somewhere."""
    owners = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
    for node in (n for owner in owners for n in owner.body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            if not calls or isinstance(node, ast.ClassDef):
                yield node.lineno, node.name


def mentioned(tree: ast.Module) -> set[str]:
    """Return the names that code reads, imports, or writes as a whole string."""
    found = set[str]()
    for node in ast.walk(code_of(tree)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_nothing_public_is_without_a_user() -> None:
    """What tests alone call is dead: a user of the package would not find it either."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *SRC.rglob("*.j2")]
    pages += [*(ROOT / "examples").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    known = FOR_USERS | CALLED_FROM_OUTSIDE
    known |= {w for page in pages for w in re.findall(r"\w+", page.read_text(encoding="utf-8"))}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files()}
    places = {path: list(defined(tree)) for path, tree in trees.items()}
    known |= set().union(*map(mentioned, trees.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in places
        for line, name in places[path]
        if name not in known
    ]
    assert not found, report(
        found, "Remove it, use it, tell of it in README or docs, or add it to FOR_USERS."
    )


def test_a_planted_dead_function_is_caught() -> None:
    tree = ast.parse("def used(): pass\ndef dead():\n    'dead'\n    used()")
    assert [n for _, n in defined(tree) if n not in mentioned(tree)] == ["dead"]


# ---- the whole tree
# --------------------------------------------------------------------------------------------------


def machine_paths(text: str) -> Iterator[Place]:
    """Find folders that exist on one machine only."""
    words = re.compile("|".join(f"/{folder}/" for folder in ("work", "tmp", "root")))
    return (
        (n, found[0])
        for n, line in enumerate(text.splitlines(), 1)
        if (found := words.search(line))
    )


def test_no_file_names_a_folder_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\0")
    if listed == [""]:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    found = []
    for path in (ROOT / name for name in listed if name and (ROOT / name).is_file()):
        data = path.read_bytes()
        if b"\0" not in data:
            found += [
                f"{path.relative_to(ROOT)}:{line}: {what}"
                for line, what in machine_paths(data.decode("utf-8", errors="replace"))
            ]
    assert not found, report(
        found, "Write paths relative to the project, or ask for a temporary folder."
    )


@pytest.mark.parametrize("package", ["record", "report"])
def test_paper_side_imports_with_torch_blocked(package: str) -> None:
    modules = [
        f"calipers.{path.relative_to(SRC).with_suffix('').as_posix().replace('/', '.')}"
        for path in sorted((SRC / package).glob("*.py"))
    ]
    if not modules:
        pytest.skip(f"calipers.{package} has no module yet")
    code = (
        "import sys; sys.modules['torch'] = None; [__import__(name.removesuffix('.__init__')) for "
        f"name in {modules}]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SRC.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"Records and reports open on a machine without torch.\n{done.stderr}"
    )


# ---- the rules themselves
# --------------------------------------------------------------------------------------------------

PLANTED: list[tuple[Rule, str]] = [
    (knows_p, "if norm == 'l2': pass"),
    (knows_p, "ok = threat.norm in ('linf', 'l1')"),
    (knows_p, "table = {'l2': 1}"),
    (knows_p, "match norm:\n    case 'linf':\n        pass"),
    (knows_p, "d = torch.linalg.vector_norm(x, ord=2)"),
    (knows_p, "d = (x - z).flatten(1).norm(p=1)"),
    (decides_adversarial, "broken = model(x).argmax(1) != y"),
    (decides_adversarial, "broken = (torch.argmax(logits, -1) == y).logical_not()"),
    (names_an_op, "if isinstance(m, nn.ReLU): pass"),
    (names_an_op, "from torch.nn.functional import leaky_relu"),
    (names_an_op, "table = {'aten.conv2d.default': 1}"),
    (names_an_op, "def bound_sigmoid(x): pass"),
    (names_a_tool, "from calipers.attacks import PGD"),
    (names_a_tool, "tool = certificates.CROWN()"),
    (names_a_tool, "if name == 'PGD': pass"),
    (asks_what_an_op_is, "if isinstance(node.op, Elementwise): pass"),
    (asks_what_an_op_is, "ok = isinstance(op, Conv | Linear)"),
    (asks_what_an_op_is, "ok = isinstance(op, (kinds, Affine))"),
    (asks_what_an_op_is, "breakpoints = getattr(op, 'breakpoints', ())"),
    (asks_what_an_op_is, "ok = hasattr(self.graph.nodes[k].op, 'windows')"),
    (touches_the_disk, "with open(path) as f: pass"),
    (touches_the_disk, "path.open('rb')"),
    (touches_the_disk, "Path(p).write_text(page)"),
    (touches_the_disk, "torch.save(x, p)"),
    (prints, "def f():\n    print('x')"),
    (draws_globally, "torch.manual_seed(0)"),
    (draws_globally, "x = torch.rand(3)"),
    (draws_globally, "x = torch.empty(3).uniform_(-1, 1)"),
    (draws_globally, "x = np.random.default_rng(0)"),
    (draws_globally, "import random"),
    (draws_globally, "from random import shuffle"),
    (waits_in_a_loop, "while True:\n    if loss.item() < 0: break"),
    (waits_in_a_loop, "worst = [m.min().item() for m in margins if m.max().item() > 0]"),
    (imports_distributed, "import torch.distributed as dist"),
    (imports_distributed, "from torch import nn\nrank = torch.distributed.get_rank()"),
    (undocumented, "def attack(x): return x"),
    (undocumented, "class Ball:\n    '''A ball.'''\n    def support(self, g): return g"),
]

INNOCENT: list[tuple[Rule, str]] = [
    (
        knows_p,
        "'''linf, l2'''\nball = Ball('linf', 0.1)\ndef f(norm='l2'): return layer_norm(x)  # norm "
        "== 'l2'",
    ),
    (decides_adversarial, "worst = margins.argmin(1)\nprediction = logits.argmax(1)"),
    (names_an_op, "converged = convert(convex)  # relu\nmessage = 'a relu cannot be bounded'"),
    (
        names_a_tool,
        "'''PGD'''\nclass PGD: pass\ndef f(): return PGD()\nmessage = 'broken by PGD and CROWN'",
    ),
    (touches_the_disk, "bracket = Bracket.open(4)\ntext = text.replace('a', 'b')"),
    (
        asks_what_an_op_is,
        "ok = is_affine(node.op) and isinstance(m, nn.Linear)\nx = getattr(tool, 'op', None)",
    ),
    (prints, "'''print(x)'''\nblueprint(x)"),
    (
        draws_globally,
        "x = torch.rand(3, generator=g)\nstreams.normal(3)\nwith torch.random.fork_rng(): pass\ng "
        "= torch.Generator().manual_seed(0)",
    ),
    (
        waits_in_a_loop,
        "for step in range(3): x = step\nlast = loss.item()\nfor k, v in d.items(): pass",
    ),
    (imports_distributed, "import torch\nfrom torch import nn"),
    (
        undocumented,
        "class _Hidden:\n    def f(self): pass\ndef _g(): pass\ndef h():\n    '''Return "
        "nothing.'''\n    def inner(): pass",
    ),
]


def name_of(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("rule", "source"), PLANTED, ids=name_of)
def test_a_planted_violation_is_caught(rule: Rule, source: str) -> None:
    prepared = ast.parse(source) if rule is undocumented else code_of(ast.parse(source))
    assert list(rule(prepared)), f"{rule.__name__} overlooks: {source}"


@pytest.mark.parametrize(("rule", "source"), INNOCENT, ids=name_of)
def test_innocent_code_passes(rule: Rule, source: str) -> None:
    prepared = ast.parse(source) if rule is undocumented else code_of(ast.parse(source))
    assert not list(rule(prepared)), f"{rule.__name__} is wrong about: {source}"


def test_a_planted_machine_path_is_caught() -> None:
    assert list(machine_paths("fine\nsee /" + "tmp/x"))
    assert not list(machine_paths("see docs/work and ./tmp and /etc/hosts"))


def test_the_message_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src" / "calipers" / "api").mkdir(parents=True)
    (tmp_path / "src" / "calipers" / "api/measure.py").write_text("x = 1\nprint(x)\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path / "src" / "calipers")
    assert strangers(prints, "cli/") == ["src/calipers/api/measure.py:2: calls print"]
    assert not strangers(prints, "api/measure.py")
