"""Is every public name where the package says it is, and is an old one told the new place?"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import calipers

ROOMS = ("attacks", "certificates", "geometry", "record")


def test_the_package_exports_few_names_and_all_are_there() -> None:
    assert len(calipers.__all__) == len(set(calipers.__all__)) <= 45
    for name in calipers.__all__:
        assert getattr(calipers, name) is not None
    assert set(calipers.__all__) | set(ROOMS) <= set(dir(calipers))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_export_what_they_list(room: str) -> None:
    package = getattr(calipers, room)
    assert package is importlib.import_module(f"calipers.{room}")
    assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PGD", "calipers.attacks.PGD"),
        ("CROWN", "calipers.certificates.CROWN"),
        ("regions_of", "calipers.geometry.regions_of"),
        ("wilson", "calipers.record.wilson"),
        ("load_model", "calipers.load"),
    ],
)
def test_an_old_name_is_told_the_new_one(old: str, new: str) -> None:
    with pytest.raises(AttributeError, match=rf"calipers\.{old} is called {new} now"):
        getattr(calipers, old)


def test_a_name_that_never_was_is_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'PDG'"):
        _ = calipers.PDG  # type: ignore[attr-defined]


def test_torch_is_imported_when_it_is_needed() -> None:
    told = "import sys, calipers, calipers.record; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
