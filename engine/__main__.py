"""`python -m engine` is the command line: what torchrun starts, `torchrun --nproc-per-node 2 -m engine extract`."""

from engine.cli import app

if __name__ == "__main__":
    app(prog_name="python -m engine")
