"""Downloads the source distribution of the installed transformers, which holds its common tests, and unpacks it.

    python tests/common_suite/fetch.py FOLDER

prints the path for EFFNET_HF_TRANSFORMERS_TESTS. A folder that has it already is left as it is.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def fetch(folder: Path) -> Path:
    name = f"transformers-{version('transformers')}"
    target = folder.expanduser().resolve() / name
    if not (target / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # Unpacked beside its place and moved there whole: an interrupted download leaves nothing half done.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            requirement = name.replace("-", "==", 1)
            subprocess.run([*pip, "--no-binary", "transformers", "--dest", scratch, requirement], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / name).rename(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(fetch(Path(sys.argv[1])))
