"""What `.ci/run` proves, in sessions; every environment is built from nothing.

`nox` runs both lanes of tests, lint and notebooks; `nox -s "tests(3.9)"` one of them; `nox -s benchmarks -- codec.py FILE` a benchmark.
"""

import re
import shlex
import tomllib
from pathlib import Path

import nox

HERE = Path(__file__).parent
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "no"
nox.options.sessions = ["tests", "lint", "notebooks"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
# A file at a time on each core, one thread each: two-threaded work beside anything else is many times slower.
TWO_CORES = "-n 2 --dist loadfile"


def environment(session: nox.Session, *packages: str) -> dict[str, str]:
    """Install the packages with the CPU build of torch, and give the variables that every command needs."""
    constraints = Path(session.virtualenv.location).resolve() / "constraints.txt"
    constraints.write_text("torch==2.13.0\n", encoding="utf-8")  # a plain torch would take a CUDA build of several GB
    variables = {**OFFLINE, "PIP_CONSTRAINT": str(constraints)}
    session.install("-q", "-U", "pip", env=variables)
    session.install("-q", *packages, env=variables)
    return variables


def readme_command() -> str:
    """The README's test command, word for word."""
    found = re.search(r"^    (pip install '\.\[test\]' && pytest)$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise ValueError("README.md no longer holds the test command")
    return found[1]


def left_out() -> str | None:
    """The marker expression of what a plain `pytest` leaves out; None where it leaves out nothing."""
    options = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]["addopts"]
    words = shlex.split(options) if isinstance(options, str) else options
    return f"not ({words[words.index('-m') + 1]})" if "-m" in words else None


@nox.session
@nox.parametrize("transformer_lens", [nox.param("4", id="4"), nox.param("3.9", id="3.9")])
def tests(session: nox.Session, transformer_lens: str) -> None:
    """Every marker with TransformerLens 4; with 3.9, all but simulations, damages and killings, which do not meet it."""
    if transformer_lens == "3.9":
        variables = environment(session, ".[test]", "transformer-lens==3.9.*", "pytest-xdist")
        variables["PYTEST_ADDOPTS"] = TWO_CORES
        session.run("pytest", "-q", "-m", "not simulation and not damage and not death", env=variables)
        return
    variables = environment(session, "pytest-xdist") | {"PYTEST_ADDOPTS": TWO_CORES}
    session.run("bash", "-euc", readme_command(), env=variables, external=True)
    if rest := left_out():
        session.run("pytest", "-q", "-m", rest, env=variables)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, mypy and the import contracts."""
    variables = environment(session, ".[dev]")
    session.run("ruff", "check", ".", env=variables)
    session.run("ruff", "format", "--check", ".", env=variables)
    session.run("mypy", env=variables)
    session.run("lint-imports", env=variables)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Every notebook of demos/ in its quick setting, on the package as it was installed (ipykernel brings this environment's kernel)."""
    variables = environment(session, ".[notebook]", "pytest-xdist")
    variables |= {"PYTEST_ADDOPTS": TWO_CORES, "BASIN_LENS_QUICK": "1", "OMP_NUM_THREADS": "1"}
    pages = sorted(str(path.relative_to(HERE)) for path in (HERE / "demos").glob("*.ipynb"))
    session.run("pytest", "-q", "--nbmake", "--nbmake-timeout=900", *pages, env=variables)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """One of tests/benchmarks with its arguments: `nox -s benchmarks -- codec.py FILE`."""
    known = sorted(path.name for path in (HERE / "tests" / "benchmarks").glob("*.py") if path.name != "__init__.py")
    if not session.posargs or session.posargs[0] not in known:
        session.error(f"expected one of {', '.join(known)} behind --, got {session.posargs[:1]}.")
    variables = environment(session, ".[test,bench]")
    script, *arguments = session.posargs
    session.run("python", f"tests/benchmarks/{script}", *arguments, env=variables)
