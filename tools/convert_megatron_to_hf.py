"""The command `megatron-pmd convert megatron-to-hf` as a script, for torchrun."""

import typer

from megatron_pmd.cli import main
from megatron_pmd.convert.command import megatron_to_hf

if __name__ == "__main__":
    main(lambda: typer.run(megatron_to_hf))
