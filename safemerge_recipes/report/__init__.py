"""Report: plain data in; terminal text, page, card and pictures out."""
