"""What a shell offers after a few letters of a command or an option."""

import shutil
import subprocess

import pytest
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.cli import command_names, typed


def script(shell):
    done = quietly(main, ["completion", shell])
    assert done.code == 0
    return done.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_command_is_in_the_script(shell):
    text = script(shell)
    assert all(typed(name) in text for name in command_names())


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    path.write_text(script("bash"))

    def complete(*words):
        line = " ".join(words)
        asked = f"source {path}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_clipfusionvad 2> /dev/null; "
        done = subprocess.run(["bash", "-c", asked + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], {"train"}),
        (["train", "--max"], {"--max-epoch"}),
        (["train", "--num-refine"], {"--num-refinement-steps"}),
        (["train", "--method", "v"], {"vadclip"}),
        (["sweep", "--job"], {"--jobs"}),
        (["sweep", "--no-ga"], {"--no-gam"}),
        (["pack", "--dt"], {"--dtype"}),
        (["extract", "--crop"], {"--crops", "--crop-ids"}),
        (["test", "--dataset", "s"], {"shanghaitech"}),
    ],
)
def test_a_shell_completes(words, expected, offered):
    assert set(offered("clipfusionvad", *words)) == expected
