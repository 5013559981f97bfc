"""Shared set-up: the environment first, then fixtures that take seconds to make."""

import pytest

from core import environment  # noqa: F401  before anything imports TensorFlow


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS folder that all tests share, so that digits are prepared once."""
    return str(tmp_path_factory.mktemp("tfds"))
