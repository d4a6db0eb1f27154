"""``python -m hap_hf`` is ``hap-hf``."""

from hap_hf.cli.app import main

if __name__ == "__main__":
    main()
