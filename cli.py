"""The command line from a checkout: python cli.py …, the same as popup-surgery …"""

from popup_surgery.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
