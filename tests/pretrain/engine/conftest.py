"""The config file of tests that run the command line, and the command line itself."""

import pytest
import yaml

from pretrain.__main__ import main


@pytest.fixture
def config_file(request, tmp_path):
    """A YAML file of the test module's `BASE`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(request.module.BASE))
    return path


@pytest.fixture
def start(config_file, shards, tmp_path, capsys):
    """Run the command line in this process: start("name", "key=value", ..).

    Returns exit status, the run's folder and what was printed to stderr.
    """

    def run(name, *arguments):
        folder = tmp_path / name
        options = [f"out={folder}", *arguments]
        if not any(a.startswith("data.shards=") for a in arguments):
            options.append(f"data.shards={shards}")
        capsys.readouterr()
        status = main([str(config_file), *options])
        return status, folder, capsys.readouterr().err

    return run
