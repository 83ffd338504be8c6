"""Floods: attacks on a server of ours on loopback, with an ordinary caller beside them."""
