"""`moejax tune`: what runs fastest on this very machine, among candidates that are first proved exact.

`registry` names the operations; each has a module (`experts`, `scan`, `attention`, `look_up`, `graphs`, `remat`) with its candidates and
the program that is checked and timed. `trial` is the child process of one candidate, `trials` starts it, `store` remembers, `run` is the
whole.
"""
