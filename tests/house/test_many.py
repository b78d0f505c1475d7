"""The marker `many`: of a law's cases the first is quick, the others are slow, and none is lost."""

pytest_plugins = ("pytester",)

CASES = """
import pytest

lane = pytest.mark.skipif(True, reason="another lane")
pytestmark = pytest.mark.many


@pytest.mark.parametrize("left", [pytest.param("a", marks=pytest.mark.slow), "b", "c", pytest.param("d", marks=lane)])
@pytest.mark.parametrize("right", [1, 2])
def test_stacked(left, right): ...


@pytest.fixture(params=["x", pytest.param("y", marks=lane), "z", pytest.param("w", marks=lane)])
def world(request):
    return request.param


class TestHeld:
    def test_fixture(self, world): ...


def test_alone(): ...
"""


def test_the_first_case_of_each_lane_is_quick_and_no_case_is_lost(pytester):
    pytester.makeini("[pytest]\nmarkers =\n    many\n    slow\n")
    pytester.makeconftest("from tests.conftest import pytest_itemcollected")
    # Plugins of the outer run, which would set up themselves anew.
    others = [
        word for name in ("xdist", "cacheprovider", "hypothesispytest", "jaxtyping", "nbmake") for word in ("-p", f"no:{name}")
    ]
    items, _ = pytester.inline_genitems(pytester.makepyfile(CASES), *others)
    slow = {item.name: [mark.kwargs for mark in item.iter_markers("slow")] for item in items}
    assert len(slow) == 8 + 4 + 1
    quick = ["test_stacked[1-b]", "test_stacked[1-d]", "test_fixture[x]", "test_fixture[y]", "test_alone"]
    assert [name for name, marks in slow.items() if not marks] == quick
    # What is slow by itself is told from the other cases of a law.
    assert slow["test_stacked[1-a]"] == slow["test_stacked[2-a]"] == [{}]
    assert slow["test_stacked[1-c]"] == slow["test_stacked[2-d]"] == slow["test_fixture[w]"] == [{"everywhere": True}]
