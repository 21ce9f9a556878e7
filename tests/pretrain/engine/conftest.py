"""The config file of tests that run the command line."""

import pytest
import yaml


@pytest.fixture
def config_file(request, tmp_path):
    """A YAML file of the test module's `BASE`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(request.module.BASE))
    return path
