"""Who may send requests: TLS and bearer tokens, from files that may be replaced at run time."""
