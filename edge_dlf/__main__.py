"""`python -m edge_dlf` is `edge-dlf`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="edge-dlf")
