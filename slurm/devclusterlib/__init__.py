"""The parts of `devcluster`; only the standard library is needed.

`settings` says what a cluster looks like (pure text), `processes` which processes are its own, `network` gives every
node its own address and host name, `daemons` starts and awaits programs, `cluster` puts them together, `cli` talks to
people.
"""
