"""Walks the tree: rules that no linter knows, each with the reason why breaking it is a defect, however it works today.

The rules are functions from a parsed file to complaints; every one is first shown to complain.
"""

from __future__ import annotations

import ast
import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "node",
    "kernels",
    "kvtransfer",
    "models",
    "worker",
    "prefill",
    "decode",
    "proxy",
    "launch",
    "testing",
    "benchmark",
    "simulator",
    "offline",
)

Complaints = Iterator[str]
Rule = Callable[[str, ast.Module], Complaints]


@cache
def tracked() -> tuple[str, ...]:
    """The files of the repository; without git (an unpacked archive), all files but those of an environment."""
    if (ROOT / ".git").exists():
        out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return tuple(name for name in out.split("\0") if name and (ROOT / name).is_file())
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return tuple(
        str(name) for name in names if not any(part[0] == "." or part == "node_modules" for part in name.parts)
    )


def python_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".py")]


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All nodes of a file, which each rule looks through."""
    return tuple(ast.walk(tree))


@pytest.fixture(scope="module", autouse=True)
def kept_trees() -> Iterator[None]:
    """Files stay parsed for all rules, and for no later test: a million nodes, which no collection looks through."""
    gc.disable()
    yield
    parsed.cache_clear()
    nodes.cache_clear()
    gc.enable()


def dotted(node: ast.AST) -> str:
    """The name that an expression is, such as os.path.join; empty where it is another expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join((node.id, *reversed(parts))) if isinstance(node, ast.Name) else ""


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module, `from a import b` as a.b."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


# ---- the rules ----------------------------------------------------------------------------------------------------

PICKLES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg")
PICKLING_NAMES = {
    *("recv_pyobj", "send_pyobj", "ForkingPickler", "ProcessPoolExecutor", "allow_pickle"),
    *("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_object_list", "recv_object_list", "ExtType", "ext_hook"),
    *("trust_remote_code", "unsafe_load", "full_load", "getoutput", "getstatusoutput"),
}
RUNNING_TEXT = ("eval", "exec", "compile", "__import__")
RUNNING_PROGRAMS = ("os.system", "os.popen", "tempfile.mktemp", "torch.hub", "torch.load", "torch.save")


def runs_foreign_code(name: str, tree: ast.Module) -> Complaints:
    """Unpickling runs whatever the sender, or the author of a weights file, wants; so does eval."""
    for line, module in imports(tree):
        if is_in(module, *PICKLES):
            yield f"{name}:{line}: imports {module}"
        if is_in(module, "multiprocessing", "torch.multiprocessing") and not is_in(
            module, "multiprocessing.shared_memory", "multiprocessing.resource_tracker"
        ):
            yield f"{name}:{line}: {module} sends pickles between processes"
        if module.rpartition(".")[2] in PICKLING_NAMES or is_in(module, *RUNNING_PROGRAMS, "msgspec.msgpack.Ext"):
            yield f"{name}:{line}: imports {module}"
    for node in nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNING_TEXT:
            yield f"{name}:{node.lineno}: calls {node.func.id}"
        if isinstance(node, ast.Attribute) and dotted(node) in (*RUNNING_PROGRAMS, "msgspec.msgpack.Ext"):
            yield f"{name}:{node.lineno}: {dotted(node)}"
        if isinstance(node, ast.Call) and dotted(node.func) == "yaml.load" and "SafeLoader" not in ast.unparse(node):
            yield f"{name}:{node.lineno}: yaml.load without a safe loader"
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False":
            yield f"{name}:{node.value.lineno}: shell="
        if isinstance(node, ast.Attribute) and node.attr in PICKLING_NAMES:
            yield f"{name}:{node.lineno}: .{node.attr}"
        if isinstance(node, ast.keyword) and node.arg in PICKLING_NAMES and ast.unparse(node.value) != "False":
            yield f"{name}:{node.value.lineno}: {node.arg}="


def renders_outside_the_sandbox(name: str, tree: ast.Module) -> Complaints:
    """A template comes with a model's files; outside the sandbox it is a program of this user."""
    for line, module in imports(tree):
        if is_in(module, "jinja2.Environment", "jinja2.Template", "jinja2.environment", "jinja2.nativetypes"):
            yield f"{name}:{line}: imports {module}"
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("jinja2.Environment", "jinja2.Template"):
            yield f"{name}:{node.lineno}: {dotted(node)}"


HTTP_CLIENTS = (
    "urllib.request",
    "urllib3",
    "http.client",
    "requests",
    "aiohttp",
    "httpx",
    "ftplib",
    "smtplib",
    "socks",
)
NODES = ("proxy/", "prefill/", "decode/", "worker/", "models/", "kvtransfer/", "kernels/")


def fetches_from_other_hosts(name: str, tree: ast.Module) -> Complaints:
    """The packages that handle requests fetch nothing: no URL in a body or a message is ever followed."""
    if not name.startswith(NODES):
        return
    for line, module in imports(tree):
        if is_in(module, *HTTP_CLIENTS, "huggingface_hub", "baton.node.http_client"):
            yield f"{name}:{line}: imports {module}"
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("open_connection", "create_connection", "urlopen"):
            yield f"{name}:{node.lineno}: .{node.attr}"


OPENING = ("zmq.ROUTER", "zmq.DEALER", "zmq.PAIR", "zmq.Context")


def opens_sockets(name: str, tree: ast.Module) -> Complaints:
    """Sockets are opened, bounded and given keys in one file, which another one answers; two more poll them, and send
    without a copy; one makes the keys."""
    if name in ("node/sockets.py", "node/authentication.py") or name.startswith("tests/"):
        return
    users = ("node/endpoint.py", "kvtransfer/planes/zeromq.py", "node/credentials.py", "node/watch.py")
    for line, module in imports(tree):
        if is_in(module, "zmq") and name not in users:
            yield f"{name}:{line}: imports {module}"
    for node in nodes(tree) if name in users else ():
        if isinstance(node, ast.Attribute) and (node.attr.startswith("setsockopt") or dotted(node) in OPENING):
            yield f"{name}:{node.lineno}: .{node.attr}"


OF_THE_ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "sys.argv")


def reads_the_environment(name: str, tree: ast.Module) -> Complaints:
    """All inputs of a process must be settings, listed in --help; no module may read others."""
    if name == "node/settings.py" or name.startswith(
        (
            "tests/",
            "scripts/",
            "deploy/",  # no node: what tests a deployment from inside
            "benchmark/harness/processes.py",  # passes it on to child processes
            "cli.py",
            "launch/serve.py",
            "launch/cluster.py",
            "launch/ray/",
            "testing/",
        )
    ):
        return
    for line, module in imports(tree):
        if module in OF_THE_ENVIRONMENT:
            yield f"{name}:{line}: imports {module}"
    programs = [tree] if name.endswith("/__main__.py") else [node for node in tree.body if is_main_block(node)]
    passed_on = {id(node.value) for program in programs for node in ast.walk(program) if is_rest_of_argv(node)}
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and id(node) not in passed_on and dotted(node) in OF_THE_ENVIRONMENT:
            yield f"{name}:{node.lineno}: {dotted(node)}"


def is_rest_of_argv(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and dotted(node.value) == "sys.argv" and ast.unparse(node.slice) == "1:"


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def leans_on_test_libraries(name: str, tree: ast.Module) -> Complaints:
    """What only the extra `test` installs is missing where Baton is served; transformers is an extra of its own."""
    if name.startswith(PACKAGES) and name != "benchmark/cluster/sides.py":  # what a benchmark compares Baton with
        for line, module in imports(tree):
            if is_in(module, "transformers") and name.startswith("models/fallback/"):
                continue
            if is_in(module, "transformers", "openai", "httpx", "pytest", "hypothesis", "baton.tests", "baton.scripts"):
                yield f"{name}:{line}: imports {module}"


def is_undocumented(name: str, tree: ast.Module) -> Complaints:
    """A file opens with what it owns; without that a reader cannot know what belongs in it."""
    if not (ast.get_docstring(tree) or "").strip():
        yield f"{name}:1: no module docstring"


RULES: list[Rule] = [
    runs_foreign_code,
    renders_outside_the_sandbox,
    fetches_from_other_hosts,
    opens_sockets,
    reads_the_environment,
    leans_on_test_libraries,
    is_undocumented,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule(rule: Rule) -> None:
    """See the rule's docstring for what it guards against."""
    assert [complaint for name in python_files() for complaint in rule(name, parsed(name))] == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (runs_foreign_code, "tests/a.py", "import pickle"),
        (runs_foreign_code, "a.py", "from pickle import loads"),
        (runs_foreign_code, "a.py", "def f():\n    import dill as d"),
        (runs_foreign_code, "a.py", "from multiprocessing import Queue"),
        (runs_foreign_code, "a.py", "import torch.multiprocessing as mp"),
        (runs_foreign_code, "a.py", "from multiprocessing.reduction import ForkingPickler"),
        (runs_foreign_code, "a.py", "from torch import load"),
        (runs_foreign_code, "a.py", "x = torch.load(path)"),
        (runs_foreign_code, "a.py", "f = torch.save"),
        (runs_foreign_code, "a.py", "np.load(path, allow_pickle=True)"),
        (runs_foreign_code, "a.py", "socket.recv_pyobj()"),
        (runs_foreign_code, "a.py", "dist.all_gather_object(a, b)"),
        (runs_foreign_code, "a.py", "eval('1')"),
        (runs_foreign_code, "a.py", "msgspec.msgpack.Decoder(ext_hook=f)"),
        (runs_foreign_code, "a.py", "msgspec.msgpack.Ext(1, b'')"),
        (runs_foreign_code, "a.py", "exec(compile(text, '', 'exec'))"),
        (runs_foreign_code, "a.py", "__import__(name)"),
        (runs_foreign_code, "a.py", "subprocess.run(line, shell=True)"),
        (runs_foreign_code, "a.py", "os.system(line)"),
        (runs_foreign_code, "a.py", "from os import popen"),
        (runs_foreign_code, "a.py", "yaml.load(text, yaml.Loader)"),
        (runs_foreign_code, "a.py", "yaml.unsafe_load(text)"),
        (runs_foreign_code, "a.py", "AutoModel.from_pretrained(folder, trust_remote_code=True)"),
        (runs_foreign_code, "a.py", "torch.hub.load(repository, 'm')"),
        (runs_foreign_code, "a.py", "tempfile.mktemp()"),
        (renders_outside_the_sandbox, "a.py", "from jinja2 import Template"),
        (renders_outside_the_sandbox, "a.py", "import jinja2\njinja2.Environment()"),
        (renders_outside_the_sandbox, "a.py", "from jinja2.nativetypes import NativeEnvironment"),
        (fetches_from_other_hosts, "proxy/http/a.py", "import urllib.request"),
        (fetches_from_other_hosts, "proxy/http/a.py", "from baton.node.http_client import HttpClient"),
        (fetches_from_other_hosts, "models/a.py", "from huggingface_hub import hf_hub_download"),
        (fetches_from_other_hosts, "decode/a.py", "asyncio.open_connection(host, 80)"),
        (opens_sockets, "decode/a.py", "import zmq.asyncio"),
        (opens_sockets, "scripts/a.py", "from zmq import Context"),
        (opens_sockets, "kvtransfer/planes/channel.py", "import zmq"),
        (opens_sockets, "node/endpoint.py", "context.socket(zmq.DEALER)"),
        (opens_sockets, "node/endpoint.py", "socket.setsockopt_string(1, '')"),
        (reads_the_environment, "node/a.py", "import os\nos.environ['X']"),
        (reads_the_environment, "node/a.py", "from os import getenv"),
        (reads_the_environment, "node/a.py", "parse(sys.argv[1:])"),
        (reads_the_environment, "proxy/__main__.py", "print(sys.argv)"),
        (reads_the_environment, "node/a.py", "if __name__ == '__main__':\n    main(sys.argv)"),
        (leans_on_test_libraries, "models/a.py", "from transformers import AutoConfig"),
        (leans_on_test_libraries, "node/a.py", "from baton.scripts import serve"),
        (is_undocumented, "a.py", "x = 1"),
        (is_undocumented, "a.py", '"""  """'),
    ],
)
def test_each_rule_complains(rule: Rule, name: str, source: str) -> None:
    """A rule that sees nothing would pass for ever."""
    assert list(rule(name, ast.parse(source))) != []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (runs_foreign_code, "a.py", "model.eval(); from multiprocessing import shared_memory; import multiprocess"),
        (runs_foreign_code, "a.py", "re.compile('a'); yaml.load(text, yaml.CSafeLoader); run(words, shell=False)"),
        (renders_outside_the_sandbox, "a.py", "from jinja2.sandbox import ImmutableSandboxedEnvironment"),
        (fetches_from_other_hosts, "offline/a.py", "from baton.node.http_client import HttpClient"),
        (fetches_from_other_hosts, "proxy/a.py", "from urllib.parse import quote"),
        (opens_sockets, "node/endpoint.py", "import zmq; zmq.Poller()"),
        (opens_sockets, "node/sockets.py", "import zmq; context.socket(zmq.ROUTER)"),
        (reads_the_environment, "proxy/__main__.py", "main(sys.argv[1:])"),
        (reads_the_environment, "node/a.py", "if __name__ == '__main__':\n    main(sys.argv[1:])"),
        (leans_on_test_libraries, "tests/a.py", "import transformers"),
    ],
)
def test_no_rule_complains_of_what_is_allowed(rule: Rule, name: str, source: str) -> None:
    """A rule that cries wolf gets switched off."""
    assert list(rule(name, ast.parse(source))) == []


MACHINE_PATHS = re.compile(
    r"(?<![\w./-])/(?:work|root|home/\w+|Users/\w+|opt/(?:wheels|pypi)|tmp/(?:venv|clone|brief))(?:/|\b(?!\w))|\.\./shared/"
)


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    """It works only there, and discloses the layout of that machine."""
    for end in ("work/main", "root/.cache", "home/me/x", "Users/me/x", "tmp/venv/bin", "opt/wheels"):
        assert MACHINE_PATHS.search(f"cd '/{end}'"), end
    assert MACHINE_PATHS.search("see .." + "/shared/x.md")
    for good in (
        "https://host/" + "work/x",
        "a/" + "root/b",
        "ipc:///tmp/x",
        "/v1/models",
        "./" + "work/x",
        "/workers",
    ):
        assert not MACHINE_PATHS.search(good), good
    found = []
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data[:8192]:
            for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
                if match := MACHINE_PATHS.search(line):
                    found.append(f"{name}:{number}: {match[0]}")
    assert found == []


PAGES = re.compile(r"(?:README|CONTRIBUTING|SECURITY)\.md|docs/(?!decisions/).*\.md")
"""Decisions are of their day: what they name may have moved since."""
NAMED_PATH = re.compile(rf"`((?:{'|'.join(PACKAGES)}|tests|scripts|docs)/(?:[\w.-]+/)*[\w-]+(?:\.\w+)?)/?`")


def test_pages_name_files_that_exist() -> None:
    """A reader who looks for a file that moved away has nothing to hold on to."""
    assert NAMED_PATH.findall("in `proxy/session.py`, `decode/`, `models/cuda` and `baton/x.py`") == [
        "proxy/session.py",
        "models/cuda",
    ]
    files = tracked()
    known = {*files, *(parent.as_posix() for name in files for parent in Path(name).parents)}
    named = [
        (page, path)
        for page in files
        if PAGES.fullmatch(page)
        for path in NAMED_PATH.findall((ROOT / page).read_text())
    ]
    assert len(named) > 100
    assert [f"{page}: {path}" for page, path in named if path not in known] == []


def test_the_walk_sees_the_packages() -> None:
    """A walk over nothing finds no fault."""
    names = python_files()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names, package
    assert len(names) > 50


NEED_RAY = ("launch/ray/actor.py", "launch/ray/deployment.py")
"""They import a library of an extra that the tests' environment has not."""


@pytest.mark.parametrize("package", ["node", "launch", "proxy", "benchmark/load", "offline"])
def test_the_control_plane_runs_without_torch(package: str) -> None:
    """torch costs an idle proxy 200 MB and seconds of its start; import-linter cannot see an import at run time."""
    modules = [
        "baton." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in python_files()
        if name.startswith(f"{package}/") and not name.endswith("__main__.py") and name not in NEED_RAY
    ]
    code = f"import sys, {', '.join(modules)}; print(*{{'torch', 'transformers', 'triton'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == []
