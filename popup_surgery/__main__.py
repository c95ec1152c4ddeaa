"""python -m popup_surgery …, the same as popup-surgery …"""

from .commands import main

raise SystemExit(main())
