"""The command line: argv, exit codes, what is printed on a terminal."""
