"""`python -m effnet_hf train …`, where the console script `effnet-hf` is not on the path."""

from .commands import main


if __name__ == "__main__":
    main()
