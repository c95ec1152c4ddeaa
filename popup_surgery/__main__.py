"""Run the command line: `python -m popup_surgery …` is the same as `popup-surgery …`."""

from .commands import main

raise SystemExit(main())
