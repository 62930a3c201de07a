"""The README's picture of a report: the top of its page in a browser, as a small PNG.

make demo && python benchmarks/report_picture.py demo/model/report docs/images/report.png

Needs chromium or google-chrome on the PATH.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image


WIDTH, HEIGHT = 1000, 1400
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description="Picture of the top of a report.")
    parser.add_argument("report", type=Path, help="folder of a report")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels from the top")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is on the PATH; install one")
    page = (arguments.report / "report.html").resolve()
    if not page.is_file():
        parser.error(f"{arguments.report} is no report: it has no report.html")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shot = Path(folder, "shot.png")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{arguments.height}"]
        subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(shot) as picture:
            small = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    small.save(arguments.picture, optimize=True)
    print(f"{arguments.picture}: {small.width} x {small.height}, {arguments.picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
