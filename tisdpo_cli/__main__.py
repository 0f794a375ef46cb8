"""`python -m tisdpo_cli`: what `accelerate launch -m` and `torchrun -m` start."""

from tisdpo_cli.cli.start import main

if __name__ == "__main__":
    main()
