"""`python -m fused_resblock`: see `cli`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
