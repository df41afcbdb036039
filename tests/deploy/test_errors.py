import pytest

from deploy.errors import ParityError, UserError, run_main


def _raiser(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize("error,code", [(UserError("no\nsuch file"), 2), (ParityError("x"), 4)])
def test_errors_with_an_exit_code_become_one_line(error, code, capsys):
    assert run_main(_raiser(error), []) == code
    stderr = capsys.readouterr().err
    assert stderr == f"error: {' '.join(str(error).split())}\n"


def test_what_a_terminal_would_obey_is_shown(capsys):
    assert run_main(_raiser(UserError("no \x1b[2J \udce9.jpg")), []) == 2
    assert capsys.readouterr().err == "error: no \\x1b[2J \\xe9.jpg\n"


def test_debug_adds_the_traceback(capsys):
    assert run_main(_raiser(UserError("no file")), ["--debug"]) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr and stderr.endswith("error: no file\n")


def test_result_passes_through_and_bugs_do_too():
    assert run_main(lambda argv: len(argv), ["a", "b"]) == 2
    with pytest.raises(KeyError):
        run_main(_raiser(KeyError("bug")), [])
