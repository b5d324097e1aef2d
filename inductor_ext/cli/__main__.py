"""``python -m inductor_ext.cli``: the same as ``inductor-ext``."""

from inductor_ext.cli import main

main()
