"""What `.ci/run` proves, in sessions; every environment is built from nothing.

`.ci/run` runs `ci`, the whole in one environment. `nox -s lint` is one part alone, in an environment of its own;
`nox -s benchmarks -- codec.py FILE` a benchmark.
"""

import re
import shlex
from pathlib import Path

import nox

HERE = Path(__file__).parent
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "no"
nox.options.sessions = ["ci"]

VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # pytest rewrites 200 files of tests in every process: half of the time it takes to collect them
    "OMP_NUM_THREADS": "1",  # two-threaded work beside anything else is many times slower
}
# Every marker that a plain `pytest` leaves out.
LEFT_OUT = "real or simulation or slow or browser or damage or death or ray"
# What both lanes run: the quick tests, and of laws marked `many` the other cases.
EVERYWHERE = f"not ({LEFT_OUT}) or slow(everywhere=True)"
# What meets TransformerLens: everything before the table, what hooks into a model, and every file with a test of HookedTransformer.
MEETS_TRANSFORMER_LENS = "model capture transport analyzers scoring controls memorize codec merging studies/test_mergeability.py"
# Of these rooms, what is about folders, pieces and shards alone.
NOT_THERE = "folder_runs folder_safety fresh_runs loaded_runs shards"
# The real model there: loading, the transport against a plain model, and what the design measured.
REAL_THERE = "model real/test_compression.py real/test_real.py"
LINT = "ruff check . && ruff format --check . && mypy && lint-imports"
# Notebooks in this order, so that both cores are busy to the end.
LONGEST = "05 02 06 04 03 07 01"
UNCHECKED = {"BASIN_LENS_TYPECHECKS": "0"}  # shapes are checked once, in the plain run


def environment(session: nox.Session, *packages: str) -> dict[str, str]:
    """Install the packages with the CPU build of torch, and give the variables that every command needs."""
    constraints = Path(session.virtualenv.location).resolve() / "constraints.txt"
    constraints.write_text("torch==2.13.0\n", encoding="utf-8")  # a plain torch would take a CUDA build of several GB
    variables = VARIABLES | {"PIP_CONSTRAINT": str(constraints)}
    session.install("-q", "-U", "pip", *packages, env=variables)
    return variables


def readme_command() -> str:
    """The README's test command, word for word."""
    found = re.search(r"^    (pip install '\.\[test\]' && pytest)$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise ValueError("README.md no longer holds the test command")
    return found[1]


def run_plain(session: nox.Session, variables: dict[str, str]) -> None:
    session.run("bash", "-euc", readme_command(), env=variables, external=True)


def run_marked(session: nox.Session, variables: dict[str, str], beside: str = "true") -> None:
    """Every other marker; beside it a command that keeps a core busy for a minute or two."""
    both = f"({beside}) & beside=$!; pytest -q -m {shlex.quote(LEFT_OUT)}; tests=$?; wait $beside && exit $tests"
    session.run("bash", "-uc", both, env=variables | UNCHECKED, external=True)


def run_tests_with_3_9(session: nox.Session) -> None:
    """The rooms that meet TransformerLens, and the real model in its own room.

    In an environment that has the newer version, pip takes the older one in its place and leaves all that suits both: two packages
    change instead of 150.
    """
    variables = environment(session, ".[test]", "transformer-lens==3.9.*")
    rooms = (f"tests/{room}" for room in MEETS_TRANSFORMER_LENS.split())
    others = (f"--ignore=tests/scoring/test_{name}.py" for name in NOT_THERE.split())
    session.run("pytest", "-q", "-m", EVERYWHERE, *rooms, *others, env=variables | UNCHECKED)
    there = (f"tests/{room}" for room in REAL_THERE.split())
    session.run("pytest", "-q", "-m", "real", "-k", "not code_of_the", *there, env=variables | UNCHECKED)


def run_notebooks(session: nox.Session, variables: dict[str, str]) -> None:
    """The kernel that ipykernel brings runs this environment's Python, and so the package as it was installed."""
    pages = sorted(
        (str(path.relative_to(HERE)) for path in (HERE / "demos").glob("*.ipynb")), key=lambda page: LONGEST.find(page[6:8])
    )
    session.run("pytest", "-q", "--nbmake", "--nbmake-timeout=900", *pages, env=variables | {"BASIN_LENS_QUICK": "1"})


@nox.session
def ci(session: nox.Session) -> None:
    """`tests(4)`, `lint`, `notebooks` and `tests(3.9)` in one environment: to build one takes a minute and a half or more."""
    variables = environment(session)
    run_plain(session, variables)
    environment(session, ".[dev]")
    run_marked(session, variables, beside=LINT)
    run_notebooks(session, variables)
    run_tests_with_3_9(session)


@nox.session
@nox.parametrize("transformer_lens", [nox.param("4", id="4"), nox.param("3.9", id="3.9")])
def tests(session: nox.Session, transformer_lens: str) -> None:
    """Every marker with TransformerLens 4; with 3.9, the rooms that meet it, and the real model in its own room."""
    if transformer_lens == "4":
        variables = environment(session)
        run_plain(session, variables)
        run_marked(session, variables)
    else:
        run_tests_with_3_9(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, mypy and the import contracts."""
    session.run("bash", "-euc", LINT, env=environment(session, ".[dev]"), external=True)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Every notebook of demos/ in its quick setting."""
    run_notebooks(session, environment(session, ".[notebook]"))


@nox.session
def benchmarks(session: nox.Session) -> None:
    """One of tests/benchmarks with its arguments: `nox -s benchmarks -- codec.py FILE`."""
    known = sorted(path.name for path in (HERE / "tests" / "benchmarks").glob("*.py") if path.name != "__init__.py")
    if not session.posargs or session.posargs[0] not in known:
        session.error(f"expected one of {', '.join(known)} behind --, got {session.posargs[:1]}.")
    variables = environment(session, ".[test,bench]")
    script, *arguments = session.posargs
    session.run("python", f"tests/benchmarks/{script}", *arguments, env=variables)
