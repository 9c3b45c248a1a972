class UserError(Exception):
    """Something a person at the command line can put right; its one line is printed and the exit code is 2."""
