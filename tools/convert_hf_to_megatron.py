"""The command `megatron-pmd convert hf-to-megatron` as a script, for torchrun."""

import typer

from megatron_pmd.cli import main
from megatron_pmd.convert.command import hf_to_megatron

if __name__ == "__main__":
    main(lambda: typer.run(hf_to_megatron))
