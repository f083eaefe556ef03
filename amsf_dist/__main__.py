"""`python -m amsf_dist`, and what torchrun starts: the command line."""

from amsf_dist.cli import main

if __name__ == "__main__":
    main()
