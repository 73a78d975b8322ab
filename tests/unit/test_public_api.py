"""The public API: what `medalign.__all__` lists is there, and importing the package imports nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

import medalign


@pytest.mark.parametrize("name", medalign.__all__)
def test_each_name_is_there_and_documented(name):
    assert getattr(medalign, name).__doc__
    assert name in dir(medalign)


def test_other_names_are_not_public():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = medalign.trian


def test_importing_the_package_is_quick():
    check = "import medalign, sys; assert 'torch' not in sys.modules and medalign.__version__"
    subprocess.run([sys.executable, "-c", check], check=True)
