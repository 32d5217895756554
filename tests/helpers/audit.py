"""Ask pip-audit for known vulnerabilities of the packages that requirements.txt pins.

Exit code 0: none; 1: some, which are listed; 2, with one line: the service did not answer.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Every version is pinned, so pip-audit need not download anything.
COMMAND = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", "--requirement"]


def main() -> int:
    done = subprocess.run(
        [sys.executable, *COMMAND, str(ROOT / "requirements.txt")], capture_output=True, text=True, cwd=ROOT
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return fail(f"the audit could not be made: {reason}")
    # No answer from the service or a mirror does not mean that nothing was found.
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return fail(f"none of {len(packages)} packages could be audited: PyPI's vulnerability data is not reached here")
    found = [(package, issue) for package in packages for issue in package.get("vulns", [])]
    for package, issue in found:
        fixed = ", ".join(issue["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {issue['id']}, fixed in {fixed}")
    print(f"{len(found)} known vulnerabilities in {len(packages) - len(skipped)} packages")
    if skipped:
        print(f"not audited: {', '.join(skipped)}")
    return 1 if found else 0


def fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
