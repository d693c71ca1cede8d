"""The first study: its results are in docs/evidence/*.json, and its page is made from them."""
