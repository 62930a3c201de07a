"""Writes three of scikit-image's photographs, for a first look at what a model says: a coffee, a cat, a photographer.

    python examples/write_photos.py demo/photos

All three are CC0, and inside scikit-image's wheel: coffee by Rachel Michetti (courtesy of Pikolo Espresso Bar), chelsea
by Stefan van der Walt, camera by Lav Varshney.
"""

from PIL import Image
from skimage import data

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.files import atomic_folder


def main() -> None:
    parser = ArgumentParser(description="Write three of scikit-image's CC0 photographs.")
    parser.add_argument("output", type=path, help="folder to write")
    target = parser.parse_args().output
    with atomic_folder(target, overwrite=True) as folder:
        for photograph in (data.coffee, data.chelsea, data.camera):
            Image.fromarray(photograph()).save(folder / f"{photograph.__name__}.png")
    print(f"{target}: coffee.png chelsea.png camera.png")


if __name__ == "__main__":
    run(main)
