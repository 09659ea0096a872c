"""The one exception that means: the user can put this right."""


class UserError(ValueError):
    """Bad input, told in one line that names the field or row, the value, the rule and the remedy.

    The command line prints the line without a traceback and exits with code 2.
    """
