"""What a shell offers after a few letters of a command or an option."""

import shutil
import subprocess

import pytest
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.cli import command_names, typed

OFFERED = {
    "tra": {"train"},
    "train --max": {"--max-epoch"},
    "train --num-refine": {"--num-refinement-steps"},
    "train --method v": {"vadclip"},
    "sweep --job": {"--jobs"},
    "sweep --no-ga": {"--no-gam"},
    "pack --dt": {"--dtype"},
    "extract --crop": {"--crops", "--crop-ids"},
    "test --dataset s": {"shanghaitech"},
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_every_command(shell, tmp_path):
    done = quietly(main, ["completion", shell])
    assert done.code == 0 and all(typed(name) in done.out for name in command_names())
    if shell == "bash" and shutil.which("bash"):
        (tmp_path / "script").write_text(done.out)
        for words, expected in OFFERED.items():
            asked = f"COMP_WORDS=(clipfusionvad {words}); COMP_CWORD={len(words.split())}; _shtab_clipfusionvad"
            code = f'source {tmp_path}/script; {asked} 2> /dev/null; echo "${{COMPREPLY[@]}}"'
            found = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout.split()
            assert set(found) == expected, words
