"""`qserve rollback` of code that is in files: it comes back where the files have."""

from pathlib import Path

from tests.support.serving import runtime_folder
from tests.support.shell import Shell, background

APP = """
    from qserve import serve
    from words import WORD

    @serve.deployment
    class Say:
        def word(self):
            return WORD
    """


def test_a_former_version_is_served_again_only_once_its_files_are_back(tmp_path: Path) -> None:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime)
        shell.write("app.py", APP)
        shell.write("words.py", "WORD = 'good'")
        with background(shell, "run", "app", "--port", "0") as running:
            running.wait_for("Ctrl-C stops it")
            words = shell.write("words.py", "WORD = 'worse'")
            assert shell.run("deploy", "app").returncode == 0
            assert shell.run("call", "Say", "word").stdout.strip() == '"worse"'

            said = shell.error("rollback", "Say")

            assert f"since it was deployed these have changed: {words}. Nothing was done." in said
            assert "Put the former files, or the former image, back" in said

            shell.write("words.py", "WORD = 'good'")
            done = shell.run("rollback", "Say")

            assert done.returncode == 0, done.stderr
            assert "again." in done.stderr
            assert "compared" not in done.stderr
            assert shell.run("call", "Say", "word").stdout.strip() == '"good"'
