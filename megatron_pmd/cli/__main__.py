from megatron_pmd.cli.main import main

main()
