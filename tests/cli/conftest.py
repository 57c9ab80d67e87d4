"""The command line, called in this process."""

import pytest

from gradstore.cli import main


@pytest.fixture
def cli(capsys, monkeypatch):
    """gradstore ARGUMENTS -> (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gradstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
